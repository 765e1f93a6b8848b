"""One engine at a time on a device: who waits, who need not, and what a wait leaves behind.

The worker is a few lines of code in the place of vLLM.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.evaluation import ask, evaluate_by, interpreter
from support.nvidia_smi import H100, Machine, uuid_of
from support.processes import FP8PIPE

from fp8pipe.config import Parallel
from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.machine.locks import Devices, devices, folder_lock, hold
from fp8pipe.progress import ProgressEvent, quiet


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8PIPE_LOCKS", str(tmp_path / "locks"))


def others(*wanted: Path | Devices) -> ExitStack:
    """These locks, held as by another run until the stack is closed."""
    stack = ExitStack()
    stack.enter_context(hold(wanted, "another run", stage="", progress=quiet))
    return stack


def test_a_finished_measurement_is_found_while_another_run_has_the_device(model: Path, tmp_path: Path) -> None:
    python, folder = interpreter(tmp_path), tmp_path / "evaluation"
    report = evaluate_by(python, ask(model), folder)
    with others(folder_lock(folder), devices("cpu")):
        assert evaluate_by(python, ask(model), folder) == report


def test_what_the_other_run_measured_meanwhile_is_not_measured_again(model: Path, tmp_path: Path) -> None:
    python, folder = interpreter(tmp_path), tmp_path / "baseline"
    events: list[ProgressEvent] = []
    other = others(folder_lock(folder))

    def finish(event: ProgressEvent) -> None:
        events.append(event)
        if event.waiting:
            other.close()
            evaluate_by(python, ask(model), folder)

    evaluate_by(python, ask(model), folder, finish)
    assert [event.waiting for event in events] == [True, False]
    assert f"waiting for {folder}, in use by pid {os.getpid()} (another run) since" in events[0].note
    assert (folder / "started").read_text() == "x"


def test_the_worker_holds_its_device_and_its_folder(model: Path, tmp_path: Path) -> None:
    worker = """
    held = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    print(sorted(held))
    report()
    """
    folder = tmp_path / "evaluation"
    evaluate_by(interpreter(tmp_path, worker), ask(model), folder)
    log = (folder / "worker.log").read_text()
    assert all(str(path) in log for path in (folder_lock(folder), *devices("cpu").files))
    with others(folder_lock(folder), devices("cpu")):
        pass  # free again


def on_gpus(model: Path, **parallel: int) -> EvalRequest:
    """A request as made on a host with H100s."""
    request = ask(model)
    return request.model_copy(
        update={"device_class": "hopper", "engine": request.engine | Parallel(**parallel).arguments}
    )


def test_two_engines_on_one_host_run_at_the_same_time_each_on_gpus_of_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine((H100,) * 8).install(tmp_path / "bin", monkeypatch)
    told: list[ProgressEvent] = []
    python = interpreter(tmp_path, 'print(os.environ["CUDA_VISIBLE_DEVICES"])\nreport()')
    with others(devices("cuda", 4)):
        for folder, parallel in (("tensor", {"tensor": 4}), ("data", {"tensor": 2, "data": 2})):
            evaluate_by(python, on_gpus(model, **parallel), tmp_path / folder, told.append)
            seen = (tmp_path / folder / "worker.log").read_text().strip()
            assert seen == ",".join(uuid_of(i) for i in range(4, 8))
    assert not [event for event in told if event.waiting]


def test_ctrl_c_ends_a_command_that_waits(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    output = tmp_path / "out"
    with others(devices("cpu")):
        run = subprocess.Popen(
            [str(FP8PIPE), "evaluate", str(model), "--output", str(output)], stderr=subprocess.PIPE, text=True
        )
        with run:
            assert run.stderr is not None
            shown = ""
            while "waiting for cpu" not in shown and (line := run.stderr.readline()):
                shown += line
            run.send_signal(signal.SIGINT)
            run.wait()
    assert run.returncode == 130, shown
    assert f"in use by pid {os.getpid()} (another run) since" in shown
    assert not (output / "request.json").exists(), "no worker was started"
