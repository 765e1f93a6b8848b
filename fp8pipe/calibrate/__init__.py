"""Snapshot + samples -> ranges of activations and of the KV cache, in one forward pass with one layer in memory.

rows       dataset -> rows                           skeleton   the model without weights, filled layer by layer
samples    rows -> token ids                         lockstep   all passes, one layer at a time
ranges     observers: minmax, percentile, mse        observe    hooks and cache -> ranges
forward    all of it put together                    resume     finished layers survive a kill
record     Calibration, the result
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.calibrate.record import Calibration, InputStatistics, KVRange, Ranges
from fp8pipe.config import ActivationScheme, KVCacheScheme, Recipe
from fp8pipe.errors import ConfigError
from fp8pipe.progress import Progress, quiet
from fp8pipe.records import Snapshot, digest_of

if TYPE_CHECKING:
    from fp8pipe.architecture import Architecture
    from fp8pipe.calibrate.forward import Targets
    from fp8pipe.plan import Plan

__all__ = ["Calibration", "InputStatistics", "KVRange", "Ranges", "calibrate", "calibration_key"]

RECORD_NAME = "calibration.json"
CALIBRATION_VERSION = 1
"""Raised whenever the same input would give other ranges."""


def calibrate(
    snapshot: Snapshot,
    plan: Plan,
    recipe: Recipe,
    folder: Path,
    *,
    architecture: Architecture | None = None,
    device: str = "cpu",
    num_samples: int | None = None,
    progress: Progress = quiet,
) -> Calibration:
    """Ranges of every module and cache that `plan` writes scales for; the record is `folder`/calibration.json.

    snapshot: downloaded. device: cpu, cuda, cuda:<n>, or auto. num_samples: in place of the recipe's. A record that is
    there is returned when its key matches; finished layers of a run that was killed are not repeated. Raises
    CalibrationDataError before any weight is read, NonFiniteActivation, UnsupportedArchitecture, MalformedCheckpoint.
    """
    from fp8pipe.architecture import inspect
    from fp8pipe.calibrate import rows
    from fp8pipe.calibrate.forward import run
    from fp8pipe.calibrate.observe import Observers
    from fp8pipe.calibrate.resume import Bookmark
    from fp8pipe.calibrate.samples import choose_samples, context_of, tokenizer_of
    from fp8pipe.checkpoint import read_headers

    start = time.monotonic()
    recipe = recipe if num_samples is None else _with_samples(recipe, num_samples)
    spec, device = recipe.calibration, _resolved(device)
    if spec.quantized_weights:
        raise ConfigError("calibration.quantized_weights: not supported; set it to false")
    revision = rows.pin(spec)
    key = _key(snapshot, recipe, revision, device)
    done = Calibration.load_if_present(folder / RECORD_NAME)
    if done is not None and done.key == key and _covers(done, plan):
        return done

    samples = choose_samples(
        spec, rows.load_rows(spec, revision), tokenizer_of(snapshot.path), context_of(snapshot.path)
    )
    headers = read_headers(snapshot)
    targets = _targets(plan, architecture or inspect(snapshot))
    bookmark = Bookmark(folder / "calibration.partial", digest_of([key, *plan.calibrated_modules()]), samples.sha256())
    observers = Observers(*_observed(recipe))
    ranges = run(
        snapshot.path,
        headers,
        targets,
        samples.token_ids,
        observers,
        bookmark,
        min_expert_tokens=spec.min_expert_tokens,
        device=device,
        progress=progress,
    )
    record = Calibration(
        **dict(ranges),
        key=key,
        model_id=snapshot.model_id,
        source_commit=snapshot.commit,
        dataset=spec.dataset,
        dataset_revision=revision,
        dataset_split=spec.split,
        sample_indices=samples.indices,
        token_ids_sha256=samples.sha256(),
        tokens=samples.tokens,
        max_seq_len=spec.max_seq_len,
        seed=spec.seed,
        observers=_observers(recipe),
        **_circumstances(device),
        seconds=time.monotonic() - start,
    )
    record.save(folder / RECORD_NAME)
    bookmark.remove()
    return record


def calibration_key(snapshot: Snapshot, recipe: Recipe, *, device: str = "cpu") -> str:
    """Digest of everything that decides the ranges; a recipe's name and the place of a local dataset are no part of it.

    Asks the Hub for the dataset's commit unless the recipe pins it. Raises CalibrationDataError, HubUnreachable.
    """
    from fp8pipe.calibrate.rows import pin

    return _key(snapshot, recipe, pin(recipe.calibration), _resolved(device))


def _key(snapshot: Snapshot, recipe: Recipe, revision: str, device: str) -> str:
    is_file = revision.startswith("sha256:")
    data = recipe.calibration.model_dump(mode="json", exclude={"dataset"} if is_file else {"revision"})
    return digest_of(
        {
            "version": CALIBRATION_VERSION,
            "source_commit": snapshot.commit,
            "modules": [recipe.targets, recipe.ignore],
            "observers": _observers(recipe),
            "data": data | {"revision": revision},
            **_circumstances(device),
        }
    )


def _covers(calibration: Calibration, plan: Plan) -> bool:
    """Whether every module and attention of `plan` is in the record."""
    attention = calibration.kv.keys() | calibration.kv_absent.keys()
    return calibration.inputs.keys() >= set(plan.calibrated_modules()) and attention >= set(plan.calibrated_attention())


def _targets(plan: Plan, architecture: Architecture) -> Targets:
    """What `plan` needs ranges for, with the names that transformers gives it."""
    from fp8pipe.calibrate.forward import Targets

    linears: dict[str, str] = {}
    experts: dict[str, tuple[str, tuple[str, int]]] = {}
    for output in plan.outputs:
        if output.role == "input_scale":
            role = architecture.tensors[output.source]
            expert = role.expert if output.slice is None else output.slice.expert
            if expert is None:
                linears[output.module] = role.module
            else:
                experts[output.module] = role.module, (role.parameter, expert)
    wanted = set(plan.calibrated_attention())
    return Targets(
        linears=linears,
        experts=experts,
        attention={layer.name: layer.module for layer in architecture.attention if layer.name in wanted},
        latent=tuple(layer.name for layer in architecture.attention if layer.mla),
    )


def _with_samples(recipe: Recipe, num_samples: int) -> Recipe:
    calibration = recipe.calibration.model_copy(update={"num_samples": num_samples})
    return recipe.model_copy(update={"calibration": calibration})


def _resolved(device: str) -> str:
    """`auto` as what is there: cuda, else cpu."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _observed(recipe: Recipe) -> tuple[ActivationScheme | None, KVCacheScheme | None]:
    """What the recipe needs ranges for."""
    static = recipe.activations is not None and recipe.activations.mode == "static"
    return (recipe.activations if static else None), recipe.kv_cache


def _observers(recipe: Recipe) -> dict[str, Any]:
    inputs, kv = _observed(recipe)
    return {
        "inputs": None if inputs is None else _observer(inputs),
        "kv": None if kv is None else _observer(kv) | {"strategy": kv.strategy},
    }


def _observer(scheme: ActivationScheme | KVCacheScheme) -> dict[str, Any]:
    if scheme.observer == "percentile":
        return {"observer": "percentile", "percentile": scheme.percentile}
    return {"observer": scheme.observer}


def _circumstances(device: str) -> dict[str, Any]:
    """What changes the last bits of a forward pass."""
    from importlib.metadata import version

    import torch

    from fp8pipe.device import class_of_capability

    on_gpu = device.startswith("cuda")
    return {
        "device_class": class_of_capability(*torch.cuda.get_device_capability(device)) if on_gpu else "cpu",
        "versions": {"torch": torch.__version__, "transformers": version("transformers")},
        "threads": torch.get_num_threads(),
    }
