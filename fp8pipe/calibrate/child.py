"""Calibration in a child process, which holds the device and gives all of its memory back when it ends.

In: what `calibrate` takes, as `folder`/request.json. Out: its record, in the same folder, and its log. A CUDA context
and its cached blocks stay with a process for as long as it lives, and the engine that is started next wants them. The
child is `python -m fp8pipe.calibrate.child REQUEST`.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from pathlib import Path

from fp8pipe.calibrate import RECORD_NAME, calibrate, finished
from fp8pipe.calibrate.key import resolved
from fp8pipe.config import Recipe
from fp8pipe.errors import EnvironmentFault, Fp8PipeError
from fp8pipe.machine.child import reporting_errors, run_child
from fp8pipe.machine.locks import devices, folder_lock, hold
from fp8pipe.machine.supervise import Ending, take_channel
from fp8pipe.progress import Progress, ProgressEvent, quiet
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Record, Snapshot
from fp8pipe.records.calibration import Calibration

STALL_S = 1800.0
"""Calibration hangs when it has not finished a pass through one layer for four times this long, or has not even logged
for this long."""


class CalibrationRequest(Record):
    """One calibration, as its child reads it."""

    snapshot: Snapshot
    plan: Plan
    recipe: Recipe
    device: str
    threads: int
    """The parent's compute threads: they are part of the key."""


def calibrate_in_child(
    snapshot: Snapshot,
    plan: Plan,
    recipe: Recipe,
    folder: Path,
    *,
    key: str,
    device: str,
    progress: Progress = quiet,
) -> Calibration:
    """`calibrate` in a process of its own, of which nothing is left in memory; it raises the same errors.

    key: `calibration_key` of these. A record of that key is returned without a child and without a lock. Otherwise the
    run waits until no other uses the device or the folder.
    """
    import torch

    if done := finished(folder, key, plan):
        return done
    device = resolved(device)
    work = f"calibrate {snapshot.model_id} for {recipe.name} in {folder}"
    with hold([folder_lock(folder), devices(device)], work, stage="calibrate", progress=progress) as held:
        if done := finished(folder, key, plan):
            return done  # whoever had the folder has measured the same
        request = CalibrationRequest(
            snapshot=snapshot,
            plan=plan,
            recipe=recipe,
            device="cuda" if held.gpus else device,  # of which the child sees one
            threads=torch.get_num_threads(),
        )
        ending = run_child(
            "fp8pipe.calibrate.child",
            request.save(folder / "request.json"),
            log=folder / "calibration.log",
            on_message=lambda message: progress(ProgressEvent(**message)),
            stall_s=STALL_S,
            held=held,
        )
        if not ending.succeeded:
            raise _failure(snapshot, ending)
        return Calibration.load(folder / RECORD_NAME)


def _failure(snapshot: Snapshot, ending: Ending) -> Fp8PipeError:
    """Why the child ended without a record, where it did not say so itself."""
    rest = f"{ending.tail()}\n(full log: {ending.log})"
    if ending.reason == "stalled":
        return EnvironmentFault(
            f"calibrating {snapshot.model_id}: hung, and was ended after {ending.seconds:.0f} s\n{rest}"
        )
    if ending.returncode in {128 + signal.SIGKILL, -signal.SIGKILL}:
        return EnvironmentFault(
            f"calibrating {snapshot.model_id}: killed (signal 9): most likely the machine ran out of memory; free "
            f"some, and run it again: finished layers are kept\n{rest}"
        )
    return Fp8PipeError(f"calibrating {snapshot.model_id}: failed (exit {ending.returncode})\n{rest}")


def main() -> None:
    """The child process."""
    import torch

    path, send = Path(sys.argv[1]), take_channel()
    with reporting_errors(send):
        request = CalibrationRequest.load(path)
        torch.set_num_threads(request.threads)

        def progress(event: ProgressEvent) -> None:
            send(asdict(event))

        calibrate(request.snapshot, request.plan, request.recipe, path.parent, device=request.device, progress=progress)


if __name__ == "__main__":
    main()
