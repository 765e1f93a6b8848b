"""Snapshot + Plan (+ calibration) -> the publishable folder, at disk speed, in memory bounded by tiles.

    plan/        which tensors are quantized, their bytes in the checkpoint, and config.json
    formats/     how a scheme is written on disk: names and shapes of scales, quantization_config
    numerics/    the arithmetic of FP8: amax, scales, codes, observers, for tensors on any device
    kernels      the same on the CPU, as compiled loops over numpy arrays
    engine/      the run itself:
      run          one run over one folder, from lock to record
      folder       whose folder it is: the lock, and what may be removed
      journal      what is finished, so that a killed run resumes where it was
      scales       ranges of a calibration -> input_scale, k_scale, v_scale
      work         what is left to do, started as source shards arrive
      weights      units of weights: measured, encoded, written
      shrinking    the mse observer on stripes
      kept         tensors that stay unquantized
      units        weights that share a range: a fused group, or one weight
      views        how a weight is stored in the source, and how a stripe of it is read
      workbench    a thread's buffers, and arithmetic on the CPU; gpu_bench: the same on a GPU
      context      what all tasks share
      finite       refusal of NaN and Inf, by tensor and index
      meter        progress in bytes and tensors
      pool         threads that run small tasks
      finisher     fsync and rename of finished shards
      package      the files beside the weights: tokenizer, licence, index, and config.json last
    identity     the fingerprint of a checkpoint, and the device that makes it

Importing this costs nothing: numba is loaded when `quantize` has work to do, and torch for a GPU, the mse observer, an
FP8 source or a calibration.
"""

from __future__ import annotations

import gc
import sys
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
    """Load the code of a run. It takes seconds, which a caller can use while it waits for something else.

    Code is no garbage, yet Python's collector looks through all of it again and again while it loads, and once more
    when the process ends. So it pauses, then leaves alone what it has."""
    collects = gc.isenabled()
    gc.disable()
    try:
        import fp8pipe.quantize.engine.run  # noqa: F401
        from fp8pipe.quantize import kernels

        kernels.load()
        if "torch" not in sys.modules:  # triton, which comes with it, prints at exit what was not collected
            gc.freeze()
    finally:
        if collects:
            gc.enable()


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
    """Write the checkpoint of `plan` into `folder`, resume it if a run was interrupted, or return it if it is finished.

    `arriving` yields files of the snapshot as they are downloaded; tensors are quantized as soon as their shards are
    there. `threads` defaults to the cores that this process may use. `device`: "cpu", "cuda" or "cuda:<n>", with the
    same bytes; runs on a GPU are tested but have not been measured. config.json is written when all else is, then
    DIR/fp8pipe/checkpoint.json.

    Raises NonFiniteWeight (with tensor and index), SourceChanged, DiskTooSmall, NoSuitableDevice, and InputError for a
    missing or unusable range or a folder that holds something else. Killed at any moment and run again, it writes the
    bytes of an undisturbed run."""
    if calibration is not None:
        from fp8pipe.quantize.engine.scales import refuse_impossible

        refuse_impossible(calibration)
    digest = calibration.digest() if calibration is not None else None
    done = Checkpoint.load_if_present(folder / RECORD_DIR / "checkpoint.json")
    if (
        done is not None
        and done.fingerprint == fingerprint(snapshot, plan.settings, digest)
        and _is_whole(folder, plan)
    ):
        for name in (JOURNAL_NAME, LOCK_NAME):  # left by a run that was killed between its record and its clean-up
            (folder / RECORD_DIR / name).unlink(missing_ok=True)
        return done

    preload()
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
    """Whether every file of a finished checkpoint exists with its size."""
    sizes = {name: outputs[-1].end for name, outputs in plan.shards().items()}
    files = [(folder / name, size) for name, size in sizes.items()]
    return (folder / "config.json").is_file() and all(p.is_file() and p.stat().st_size == size for p, size in files)
