"""A release is killed in each of its stages, and the same command finishes it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import FP8PIPE, all_gone, family, processes, running

from fp8pipe.records import Outcome
from fp8pipe.rehearsal import localhub
from fp8pipe.rehearsal.demo.model import BASE_ID
from fp8pipe.release.workspace import Workspace

pytestmark = [pytest.mark.long, pytest.mark.vllm, pytest.mark.prefect, pytest.mark.timeout(1800)]

STAGES = ("download", "calibrate", "quantize", "validate", "evaluate baseline", "evaluate candidate", "gate", "publish")
DELAYS_S = {"calibrate": 1.0, "evaluate baseline": 4.0, "evaluate candidate": 12.0}
"""After the stage is announced: while calibration's child starts, while vLLM is imported, while the engine is there."""
FROM_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""Ctrl-C and a closed terminal reach every process of the foreground group."""


PUSH = """
import sys
from pathlib import Path
from fp8pipe.progress import quiet
from fp8pipe.rehearsal.demo.run import prepare_base
prepare_base(Path(sys.argv[1]), quiet)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, *FROM_A_TERMINAL, signal.SIGTERM], ids=lambda one: one.name)
def test_a_release_that_is_killed_in_every_stage_ends_released(
    number: signal.Signals, demo_base: Path, tmp_path: Path
) -> None:
    """Of the demo's model, calibrated and without an FP8 KV cache, which not every CPU serves."""
    work, shared = tmp_path / "work", set(Path("/dev/shm").iterdir())
    command = [str(FP8PIPE), "release", BASE_ID, "--recipe", "demo-fp8-static", "--suite", "demo"]
    command += ["--policy", "demo", "--repo-id", f"{BASE_ID}-killed", "--work-dir", str(work)]
    shutil.copytree(demo_base, tmp_path / "base" / "model")
    with localhub.start(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment() | {"HF_HOME": str(tmp_path / "hf")}
        environment |= {"PREFECT_HOME": str(tmp_path / "prefect")}
        subprocess.run([sys.executable, "-c", PUSH, str(tmp_path / "base")], env=environment, check=True)
        for stage in STAGES:
            with (tmp_path / f"{stage}.txt").open("w+") as screen:
                run = subprocess.Popen(command, stdout=screen, stderr=screen, env=environment, start_new_session=True)
                try:
                    wait_for(f"... {stage}", Path(screen.name), run.pid)
                    time.sleep(DELAYS_S.get(stage, 0.0))
                    members = family([run.pid])
                    assert len(members) > 1, f"{stage}: its Prefect server runs with it: {members}"
                    (os.killpg if number in FROM_A_TERMINAL else os.kill)(run.pid, number)
                    run.wait(60)
                finally:
                    run.kill()
                    run.wait()
            text = Path(screen.name).read_text()
            assert run.returncode != 0, f"{stage}: finished before it was killed\n{text}"
            assert "Traceback" not in text, text
            assert all_gone(members), f"{stage}: left {[one for pid, one in members.items() if running(pid)]}\n{text}"
            assert not [line for _, line in processes().values() if str(work) in line], stage
            assert locked(work) == [], stage
            assert set(Path("/dev/shm").iterdir()) <= shared, f"{stage}: shared memory is left"
        last = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert last.returncode == 0, last.stdout + last.stderr
    (made,) = Workspace(work).releases()
    assert Outcome.load(made.outcome).release is not None


def wait_for(words: str, screen: Path, pid: int) -> None:
    deadline = time.monotonic() + 240
    while words not in screen.read_text():
        assert running(pid) and time.monotonic() < deadline, f"never reached {words!r}:\n{screen.read_text()}"
        time.sleep(0.01)


def locked(folder: Path) -> list[Path]:
    """Lock files, of devices and in this folder, that some process holds."""
    found: list[Path] = []
    for path in (*Path(os.environ["FP8PIPE_LOCKS"]).iterdir(), *folder.rglob("lock")):
        with path.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path)
    return found
