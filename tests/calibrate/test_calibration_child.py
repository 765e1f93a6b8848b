"""Calibration in a child process: the same record, the same errors, nothing left in memory, and it survives a kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.calibration import STATIC_KV, planned, run_calibration, with_data, write_dataset
from support.processes import all_gone, family

from fp8pipe.calibrate import calibration_key
from fp8pipe.calibrate.child import calibrate_in_child
from fp8pipe.config import Recipe
from fp8pipe.errors import CalibrationDataError, EnvironmentFault
from fp8pipe.machine.locks import devices, folder_lock, hold
from fp8pipe.progress import Progress, ProgressEvent, quiet
from fp8pipe.records.calibration import Calibration


def in_child(model: Path, recipe: Recipe, folder: Path, progress: Progress = quiet) -> Calibration:
    snapshot, plan, _ = planned(model, recipe)
    key = calibration_key(snapshot, recipe)
    return calibrate_in_child(snapshot, plan, recipe, folder, key=key, device="cpu", progress=progress)


def children() -> dict[int, str]:
    """This process's calibrations, with all that they started."""
    mine = family([os.getpid()])
    return family(pid for pid, command in mine.items() if "fp8pipe.calibrate.child" in command)


def kill_at(layers: int, found: dict[int, str]) -> Callable[[ProgressEvent], None]:
    """Kill the child when this many layers are done."""

    def kill(event: ProgressEvent) -> None:
        if event.done >= layers and not found:
            found.update(children())
            for pid, command in found.items():
                if "supervise.py" not in command:
                    os.kill(pid, signal.SIGKILL)

    return kill


def test_a_killed_child_is_explained_resumed_and_ends_with_the_record_of_this_process(
    llama: Path, tmp_path: Path
) -> None:
    recipe, folder = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl")), tmp_path / "out"
    killed: dict[int, str] = {}
    with pytest.raises(EnvironmentFault, match=r"killed \(signal 9\).*finished layers are kept"):
        in_child(llama, recipe, folder, kill_at(1, killed))
    assert len(killed) == 2, "the guard and the child"
    assert all_gone(killed)
    assert not (folder / "calibration.json").exists()

    events: list[ProgressEvent] = []
    record = in_child(llama, recipe, folder, events.append)
    # the child may have finished another layer before the signal came
    assert {"model.layers.3"} <= {event.note for event in events} <= {f"model.layers.{n}" for n in (1, 2, 3)}
    assert {(event.stage, event.total, event.unit) for event in events} == {("calibrate", 4, "layers")}
    assert not children()
    with hold([folder_lock(folder), devices("cpu")], "", stage="", progress=quiet):
        assert in_child(llama, recipe, folder) == record, "a finished record is found without a lock"

    here = run_calibration(llama, recipe, tmp_path / "here")
    assert record.model_copy(update={"seconds": 0}) == here.model_copy(update={"seconds": 0})


def test_an_error_of_the_child_keeps_its_class(llama: Path, tmp_path: Path) -> None:
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl", [{"text": "one"}]))
    with pytest.raises(CalibrationDataError, match=r"expected 5 samples, found 1.*\(log: .*calibration\.log\)"):
        in_child(llama, recipe, tmp_path / "out")
