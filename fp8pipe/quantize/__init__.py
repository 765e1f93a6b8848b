"""Snapshot + Plan (+ ranges) -> the publishable folder, at disk speed, in memory bounded by tiles.

    engine     stripes of weights through numerics into preallocated shards, on all cores
    views      how a Linear weight lies in the source, and how a stripe of it is read
    units      what shares a range: a fused group, or one weight
    meter      progress in bytes and tensors
    pool       threads that run small tasks, newest first
    run        one run over one folder: lock, journal, shards, companions, config.json, record
    scales     ranges of a calibration -> input_scale, k_scale, v_scale
    journal    what is finished, so that a killed run goes on where it was
    package    the files beside the weights: tokenizer, licence, index, and config.json last

Importing this costs nothing; torch is loaded when `quantize` has work to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fp8pipe.progress import Progress, quiet
from fp8pipe.quantize.identity import ENGINE_VERSION, JOURNAL_NAME, LOCK_NAME, device_for, fingerprint
from fp8pipe.records import RECORD_DIR, Checkpoint, Snapshot

if TYPE_CHECKING:
    from fp8pipe.quantize.plan import Plan
    from fp8pipe.records.calibration import Calibration

__all__ = ["ENGINE_VERSION", "device_for", "fingerprint", "preload", "quantize"]


def preload() -> None:
    """Load the code of a run. It takes seconds, which a caller that waits for something else can spend on it."""
    import fp8pipe.quantize.engine.run  # noqa: F401
    from fp8pipe.quantize.numerics import kernels

    kernels.load()


def quantize(
    snapshot: Snapshot,
    plan: Plan,
    folder: Path,
    *,
    calibration: Calibration | None = None,
    threads: int | None = None,
    arriving: Iterable[Path] | None = None,
    device: str = "cpu",
    progress: Progress = quiet,
) -> Checkpoint:
    """Write the checkpoint of `plan` into `folder`, or go on with it, or return it when it is there.

    `arriving` yields files of the snapshot as they are downloaded; a shard's tensors are quantized once it is there.
    `threads` defaults to the cores this process may use. `device` "cuda" measures and encodes there, with the same
    bytes as a result; it has tests, and has not been run on a GPU yet. config.json is written last, then
    DIR/fp8pipe/checkpoint.json.

    Raises NonFiniteWeight (tensor and index), SourceChanged, DiskTooSmall, NoSuitableDevice, InputError for a missing
    or non-finite range or a folder that holds something else. Killed at any moment and run again, the bytes are those
    of an undisturbed run."""
    from fp8pipe.quantize.engine.scales import refuse_impossible

    refuse_impossible(calibration)
    digest = calibration.digest() if calibration is not None else None
    done = Checkpoint.load_if_present(folder / RECORD_DIR / "checkpoint.json")
    if (
        done is not None
        and done.fingerprint == fingerprint(snapshot, plan.settings, digest)
        and _is_whole(folder, plan)
    ):
        for name in (JOURNAL_NAME, LOCK_NAME):  # a run killed between its record and its clean-up leaves them
            (folder / RECORD_DIR / name).unlink(missing_ok=True)
        return done

    from fp8pipe.quantize.engine.run import run

    return run(
        snapshot,
        plan,
        folder,
        calibration=calibration,
        threads=threads,
        arriving=arriving,
        device=device,
        progress=progress,
    )


def _is_whole(folder: Path, plan: Plan) -> bool:
    """Whether every file of a finished checkpoint is there with its size."""
    sizes = {name: outputs[-1].end for name, outputs in plan.shards().items()}
    files = [(folder / name, size) for name, size in sizes.items()]
    return (folder / "config.json").is_file() and all(p.is_file() and p.stat().st_size == size for p, size in files)
