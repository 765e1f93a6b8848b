"""Ranges of activations and of the KV cache, measured in one forward pass with one layer in memory.

dataset       rows of a local file or a Hub dataset     hooks        observes one layer while it runs
tokenization  rows -> token ids; the chat template      experts      observes mixtures of experts
samples       which rows are run                        observers    values -> range: minmax, percentile, mse
targets       plan -> modules to observe                cpu_linear   16-bit Linears on CPUs without instructions
skeleton      the model without weights                 waiting      hidden states of parked passes
layers        weights of one layer, then the next       moves        copies between host and device
weights       their ranges, kept for quantizing         memory       what the device holds; smaller passes
lockstep      all passes, one layer at a time           resume       finished layers survive a kill
forward       the loop over layers                      key          equal keys, equal ranges
ranges        measured, taken instead, or refused       sensitivity  what FP8 costs each Linear
child         all of it in a process that ends
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.calibrate.key import environment, key_of, observers_of, resolved
from fp8pipe.config import CalibrationSpec, Recipe, dataset_name
from fp8pipe.files import digest_of
from fp8pipe.progress import Progress, quiet
from fp8pipe.records import Snapshot
from fp8pipe.records.calibration import Calibration

if TYPE_CHECKING:
    from fp8pipe.calibrate.samples import Samples
    from fp8pipe.calibrate.skeleton import Skeleton
    from fp8pipe.model.architecture import Architecture
    from fp8pipe.quantize.plan import Plan

__all__ = ["RECORD_NAME", "calibrate", "calibration_key", "finished"]

RECORD_NAME = "calibration.json"


def calibrate(
    snapshot: Snapshot,
    plan: Plan,
    recipe: Recipe,
    folder: Path,
    *,
    architecture: Architecture | None = None,
    samples: Samples | None = None,
    device: str = "cpu",
    progress: Progress = quiet,
) -> Calibration:
    """Ranges of every module and cache that `plan` writes scales for, saved as `folder`/calibration.json.

    snapshot: downloaded. architecture: transformers is asked unless it is given. samples: those that the recipe
    chooses, if they are known. device: cpu, cuda, cuda:<n>, or auto.
    An existing record is returned when its key matches, and a run that was killed resumes behind its last finished
    layer. Raises CalibrationDataError for unfit data (before any weight is read) and for an input whose range is 0;
    NonFiniteActivation, UnsupportedArchitecture, MalformedCheckpoint, SourceChanged, HubUnreachable; EnvironmentFault
    when a single sample does not fit into memory.
    """
    from fp8pipe.calibrate.dataset import pin
    from fp8pipe.oracle.transformers import inspect

    start = time.monotonic()
    device = resolved(device)
    revision = pin(recipe.calibration)
    key = key_of(snapshot, recipe, revision, device)
    if done := finished(folder, key, plan):
        return done

    samples = samples or _samples(snapshot, plan, recipe, revision)
    from fp8pipe.calibrate.forward import run
    from fp8pipe.calibrate.resume import Bookmark
    from fp8pipe.calibrate.sensitivity import kept_by
    from fp8pipe.calibrate.targets import Schemes, targets_of

    architecture = architecture or inspect(snapshot, trust_remote_code=plan.trust_remote_code)
    targets = targets_of(plan, architecture)
    identity = digest_of([key, *targets.linears, *targets.experts])
    bookmark = Bookmark(folder / "calibration.partial", identity, samples.sha256())
    with ExitStack() as stack:
        skeleton = _skeleton(snapshot, plan, device, stack)
        ranges = run(skeleton, targets, samples.token_ids, Schemes.of(recipe), bookmark, progress=progress)
    kept = kept_by(recipe.keep_bf16, plan, architecture, ranges.sensitivity)
    record = Calibration(
        **dict(ranges),
        kept=kept,
        key=key,
        model_id=snapshot.model_id,
        source_commit=snapshot.commit,
        **_data(recipe.calibration, revision, samples),
        observers=observers_of(recipe),
        **asdict(environment(device)),
        seconds=time.monotonic() - start,
    )
    record.save(folder / RECORD_NAME)
    bookmark.remove()
    return record


def _data(spec: CalibrationSpec, revision: str | None, samples: Samples) -> dict[str, Any]:
    """The fields of the record that name the data: the dataset, its commit, the rows and their tokens."""
    return {
        "dataset": dataset_name(spec.dataset),
        "dataset_revision": revision,
        "dataset_split": spec.split,
        "sample_indices": samples.indices,
        "token_ids_sha256": samples.sha256(),
        "tokens": samples.tokens,
        "max_seq_len": spec.max_seq_len,
        "seed": spec.seed,
    }


def calibration_key(snapshot: Snapshot, recipe: Recipe, *, device: str = "cpu") -> str:
    """Digest of everything that decides the ranges; neither a recipe's name nor a local dataset's path enters it.

    Asks the Hub for the dataset's commit unless the recipe pins it. Raises CalibrationDataError, HubUnreachable.
    """
    from fp8pipe.calibrate.dataset import pin

    return key_of(snapshot, recipe, pin(recipe.calibration), resolved(device))


def _samples(snapshot: Snapshot, plan: Plan, recipe: Recipe, revision: str) -> Samples:
    """Token ids of the recipe's data under the model's own tokenizer."""
    from fp8pipe.calibrate.dataset import files_of
    from fp8pipe.calibrate.samples import find_samples

    files = files_of(recipe.calibration, revision)
    with ThreadPoolExecutor(1) as pool:  # importing the libraries that come next takes as long as the child does
        importing = pool.submit(import_module, "fp8pipe.calibrate.forward")
        samples = find_samples(recipe.calibration, files, snapshot.path, trust_remote_code=plan.trust_remote_code)
        importing.result()
    return samples


def _skeleton(snapshot: Snapshot, plan: Plan, device: str, stack: ExitStack) -> Skeleton:
    """The model without weights; those of an FP8 source are dequantized when they are loaded."""
    from fp8pipe.calibrate.skeleton import Skeleton
    from fp8pipe.calibrate.weights import WeightRanges
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
        weights=WeightRanges(plan),
    )


def finished(folder: Path, key: str, plan: Plan) -> Calibration | None:
    """The record of an earlier calibration with this key, if it has what `plan` needs."""
    done = Calibration.load_if_present(folder / RECORD_NAME)
    return done if done is not None and done.key == key and _covers(done, plan) else None


def _covers(calibration: Calibration, plan: Plan) -> bool:
    """Whether the record has a range, or a reason for none, for every module and attention of `plan`."""
    attention = calibration.kv.keys() | calibration.kv_absent.keys()
    return calibration.inputs.keys() >= set(plan.calibrated_modules()) and attention >= set(plan.calibrated_attention())
