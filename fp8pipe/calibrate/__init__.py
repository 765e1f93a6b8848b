"""Snapshot + samples -> ranges of activations and of the KV cache, in one forward pass with one layer in memory.

rows       dataset -> rows                           skeleton   the model without weights, filled layer by layer
samples    rows -> token ids                         lockstep   all passes, one layer at a time
batches    samples -> passes                         observe    hooks and cache -> ranges
targets    plan -> what to observe                   experts    the same for mixture of experts
ranges     observers: minmax, percentile, mse        noise      what FP8 costs each Linear
identity   equal keys, equal ranges                  rounding   weights and inputs as FP8 has them
forward    all of it put together                    resume     finished layers survive a kill
products   16-bit products on a CPU without them     weights    a layer's weights, read
record     Calibration, the result                   held       what passes hold besides, kept small
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.calibrate.identity import circumstances, key_of, observers_of, resolved
from fp8pipe.config import Recipe
from fp8pipe.files import digest_of
from fp8pipe.progress import Progress, quiet
from fp8pipe.records import Snapshot
from fp8pipe.records.calibration import Calibration, KVRange, LayerSensitivity, Ranges, Sensitivity

if TYPE_CHECKING:
    from fp8pipe.calibrate.samples import Samples
    from fp8pipe.calibrate.skeleton import Skeleton
    from fp8pipe.model.architecture import Architecture
    from fp8pipe.quantize.plan import Plan

__all__ = ["Calibration", "KVRange", "LayerSensitivity", "Ranges", "Sensitivity", "calibrate", "calibration_key"]

RECORD_NAME = "calibration.json"


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
    CalibrationDataError before any weight is read, or for data that leave an input without a range;
    NonFiniteActivation, UnsupportedArchitecture, MalformedCheckpoint, SourceChanged, and EnvironmentFault when memory
    does not suffice for one sample.
    """
    from fp8pipe.calibrate.forward import run
    from fp8pipe.calibrate.observe import Schemes
    from fp8pipe.calibrate.resume import Bookmark
    from fp8pipe.calibrate.rows import pin
    from fp8pipe.calibrate.sensitivity import kept_by
    from fp8pipe.calibrate.targets import targets_of
    from fp8pipe.oracle.transformers import inspect

    start = time.monotonic()
    recipe, device = _with_samples(recipe, num_samples), resolved(device)
    revision = pin(recipe.calibration)
    key = key_of(snapshot, recipe, revision, device)
    done = Calibration.load_if_present(folder / RECORD_NAME)
    if done is not None and done.key == key and _covers(done, plan):
        return done

    samples = _samples(snapshot, plan, recipe, revision)
    architecture = architecture or inspect(snapshot, trust_remote_code=plan.trust_remote_code)
    targets = targets_of(plan, architecture)
    identity = digest_of([key, *targets.linears, *targets.experts])
    bookmark = Bookmark(folder / "calibration.partial", identity, samples.sha256())
    with ExitStack() as stack:
        skeleton = _skeleton(snapshot, plan, device, stack)
        ranges = run(skeleton, targets, samples.token_ids, Schemes.of(recipe), bookmark, progress=progress)
    record = Calibration(
        **dict(ranges),
        kept=kept_by(recipe.keep_bf16, plan, architecture, ranges.sensitivity),
        key=key,
        **_provenance(snapshot, recipe, revision, samples),
        **circumstances(device),
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

    return key_of(snapshot, recipe, pin(recipe.calibration), resolved(device))


def _samples(snapshot: Snapshot, plan: Plan, recipe: Recipe, revision: str) -> Samples:
    """Token ids of the recipe's data, under the model's own tokenizer."""
    from fp8pipe.calibrate.rows import load_rows
    from fp8pipe.calibrate.samples import choose_samples, context_of, tokenizer_of

    trusted = plan.trust_remote_code
    tokenizer = tokenizer_of(snapshot.path, trust_remote_code=trusted)
    context = context_of(snapshot.path, trust_remote_code=trusted)
    return choose_samples(recipe.calibration, load_rows(recipe.calibration, revision), tokenizer, context)


def _skeleton(snapshot: Snapshot, plan: Plan, device: str, stack: ExitStack) -> Skeleton:
    """The model without weights; those of a source that is FP8 already are dequantized when they are loaded."""
    from fp8pipe.calibrate.skeleton import Skeleton
    from fp8pipe.hub.headers import read_headers
    from fp8pipe.model.shards import SourceFiles

    scales = {tensor.name: tensor.scale for tensor in plan.tensors if tensor.scale}
    return Skeleton(
        snapshot.path,
        read_headers(snapshot),
        SourceFiles(snapshot.path, stack),
        device,
        trust_remote_code=plan.trust_remote_code,
        scales=scales,
        block=plan.source_block,
    )


def _provenance(snapshot: Snapshot, recipe: Recipe, revision: str, samples: Samples) -> dict[str, Any]:
    """Fields of the record that say where the ranges come from."""
    data = recipe.calibration
    return {
        "model_id": snapshot.model_id,
        "source_commit": snapshot.commit,
        "dataset": data.dataset,
        "dataset_revision": revision,
        "dataset_split": data.split,
        "sample_indices": samples.indices,
        "token_ids_sha256": samples.sha256(),
        "tokens": samples.tokens,
        "max_seq_len": data.max_seq_len,
        "seed": data.seed,
        "observers": observers_of(recipe),
    }


def _covers(calibration: Calibration, plan: Plan) -> bool:
    """Whether every module and attention of `plan` is in the record."""
    attention = calibration.kv.keys() | calibration.kv_absent.keys()
    return calibration.inputs.keys() >= set(plan.calibrated_modules()) and attention >= set(plan.calibrated_attention())


def _with_samples(recipe: Recipe, num_samples: int | None) -> Recipe:
    if num_samples is None:
        return recipe
    calibration = recipe.calibration.model_copy(update={"num_samples": num_samples})
    return recipe.model_copy(update={"calibration": calibration})
