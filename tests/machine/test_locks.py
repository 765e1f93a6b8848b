"""Locks on devices and folders: with whom they end, what a run that waits reports, and which files they are."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.nvidia_smi import A100, B200, H100, H100_MIG, Machine, instance_uuid, uuid_of
from support.processes import all_gone, running

from fp8pipe.errors import EnvironmentFault, NoSuitableDevice
from fp8pipe.machine import locks
from fp8pipe.machine.locks import Held, devices, folder_lock, hold
from fp8pipe.progress import Progress, ProgressEvent, quiet


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this test's locks on devices."""
    monkeypatch.setenv("FP8PIPE_LOCKS", str(tmp_path / "locks"))
    return tmp_path / "locks"


def is_free(path: Path) -> bool:
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


HOLDER = """
import sys
from pathlib import Path
from fp8pipe.machine import supervise
from fp8pipe.machine.locks import devices, hold
from fp8pipe.progress import quiet
supervise.GRACE_S = 600.0
with hold([devices("cpu")], "evaluate acme/tiny", stage="evaluate", progress=quiet) as held:
    supervise.supervise(sys.argv[2:], log=Path(sys.argv[1], "log"), locks=held.locks)
print("ended", flush=True)
sys.stdin.read()
"""
DEAF = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""


@contextmanager
def holder(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A run that holds the device for a command which ignores TERM: the run, and the command's pid."""
    sign = folder / "pid"
    command = [sys.executable, "-c", HOLDER, str(folder), sys.executable, "-IS", "-c", DEAF, str(sign)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        try:
            while not (sign.exists() and sign.read_text()):
                assert run.poll() is None
            yield run, int(sign.read_text())
        finally:
            run.kill()


# ---------------------------------------------------------------------------------------------- with whom they end


def test_a_killed_run_keeps_the_device_until_its_processes_are_gone_and_then_no_longer(tmp_path: Path) -> None:
    (lock,) = devices("cpu").files
    with holder(tmp_path) as (run, command):
        assert not is_free(lock)
        run.kill()
        run.wait()
        assert running(command)
        assert not is_free(lock), "the command still uses the device"
        os.kill(command, signal.SIGKILL)
        with hold([lock], "", stage="", progress=quiet):
            assert all_gone([command])


def test_a_run_that_lives_on_gives_the_device_back_when_its_command_ends(tmp_path: Path) -> None:
    (lock,) = devices("cpu").files
    with holder(tmp_path) as (run, command):
        os.kill(command, signal.SIGKILL)
        assert run.stdout is not None and run.stdout.readline() == "ended\n"
        assert is_free(lock) and run.poll() is None


def test_a_lock_is_not_inherited_by_what_else_the_run_starts(folder: Path) -> None:
    with hold([devices("cpu")], "", stage="", progress=quiet) as held:
        other = subprocess.Popen(["sleep", "600"], close_fds=False)
        assert len(held.locks) == 1
    try:
        assert is_free(devices("cpu").files[0])
    finally:
        other.kill()
        other.wait()


# ---------------------------------------------------------------------------------------------- who waits


def test_a_run_that_waits_is_told_for_whom_once_and_then_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[ProgressEvent] = []
    with holder(tmp_path) as (run, command):

        def end(event: ProgressEvent) -> None:
            told.append(event)
            if event.waiting:
                os.kill(command, signal.SIGKILL)

        with hold([devices("cpu")], "evaluate acme/other", stage="evaluate", progress=end):
            pass
    waited, began = told
    words = rf"waiting for cpu, in use by pid {run.pid} \(evaluate acme/tiny\) since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(words, waited.note)
    assert not began.waiting
    assert [record.getMessage() for record in caplog.records] == [f"evaluate: {waited.note}"]


def test_nothing_is_told_by_a_run_that_need_not_wait(tmp_path: Path) -> None:
    told: list[ProgressEvent] = []
    with hold([folder_lock(tmp_path), devices("cpu")], "", stage="", progress=told.append) as held:
        assert len(held.locks) == 2
    assert not told


def test_a_wait_can_be_interrupted_and_leaves_nothing_locked(tmp_path: Path) -> None:
    def interrupt(event: ProgressEvent) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    (lock,) = devices("cpu").files
    with hold([lock], "", stage="", progress=quiet):
        with (
            pytest.raises(KeyboardInterrupt),
            hold([folder_lock(tmp_path), lock], "", stage="", progress=interrupt),
        ):
            pass
        assert is_free(folder_lock(tmp_path))
    assert is_free(lock)


def test_a_file_that_someone_removed_meanwhile_is_not_the_one_that_counts() -> None:
    (lock,) = devices("cpu").files
    with hold([lock], "", stage="", progress=quiet):

        def clean(path: Path, descriptor: int) -> bool:
            if not cleaned:
                cleaned.append(path.unlink())
            return True

        cleaned: list[None] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(locks, "_try_lock", clean)
            with hold([lock], "", stage="", progress=quiet) as held:
                assert os.path.samestat(os.fstat(held.locks[0]), lock.stat())


# ---------------------------------------------------------------------------------------------- several GPUs


@pytest.fixture
def eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine((H100,) * 8).install(tmp_path / "bin", monkeypatch)


def taking(count: int, progress: Progress = quiet) -> AbstractContextManager[Held]:
    return hold([devices("cuda", count)], f"evaluate on {count}", stage="evaluate", progress=progress)


def test_as_many_runs_as_fit_have_gpus_of_their_own(eight: None) -> None:
    with taking(4) as one, taking(2) as other, taking(2) as third:
        assert [held.gpus for held in (one, other, third)] == [
            tuple(uuid_of(i) for i in some) for some in ((0, 1, 2, 3), (4, 5), (6, 7))
        ]
        assert other.environ == {"CUDA_VISIBLE_DEVICES": f"{uuid_of(4)},{uuid_of(5)}"}
    assert Held().environ == {}


def test_a_run_that_finds_too_few_keeps_none_and_is_told_who_has_the_others(eight: None) -> None:
    told: list[ProgressEvent] = []
    with ExitStack() as others:
        others.enter_context(taking(3))
        others.enter_context(taking(2))

        def end(event: ProgressEvent) -> None:
            told.append(event)
            if event.waiting:
                with taking(3):  # which it does not keep while it waits
                    others.close()

        with taking(4, end) as held:
            assert held.gpus == tuple(uuid_of(i) for i in range(4))
    words = (
        r"waiting for 4 of 8 GPUs, 3 of which are free, in use by (pid \d+ \(evaluate on [32]\) since [^;]+(; )?){2}"
    )
    assert re.fullmatch(words, told[0].note)
    assert [event.waiting for event in told] == [True, False]


TAKER = """
import sys
from fp8pipe.machine.locks import devices, hold
from fp8pipe.progress import quiet
for _ in range(5):
    with hold([devices("cuda", int(sys.argv[1]))], "", stage="", progress=quiet) as held:
        assert len(set(held.gpus)) == int(sys.argv[1])
"""


def test_runs_that_want_more_than_half_do_not_wait_for_each_other_for_ever(eight: None, folder: Path) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", TAKER, count]) for count in ("5", "6", "8")]
    assert [run.wait() for run in runs] == [0, 0, 0]


# ---------------------------------------------------------------------------------------------- which files


def test_a_gpu_is_locked_by_its_uuid_however_this_process_numbers_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine((A100, A100, A100)).install(tmp_path / "bin", monkeypatch)

    def names(device: str, count: int = 1) -> list[str]:
        wanted = devices(device, count)
        assert wanted.count == (1 if device == "cpu" else count)
        return [path.name.removeprefix("fp8pipe-").removesuffix(".lock") for path in wanted.files]

    assert names("cuda") == [uuid_of(0), uuid_of(1), uuid_of(2)]
    assert names("cuda:1") == [uuid_of(1)]
    assert names("cuda:1", 2) == [uuid_of(1), uuid_of(2)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert names("cuda", 2) == [uuid_of(2), uuid_of(0)]
    assert names("cuda:0") == [uuid_of(2)]
    assert names("cpu") == ["cpu"]
    with pytest.raises(NoSuitableDevice, match=r"takes 3 GPUs of one model, and this process may use 2"):
        devices("cuda", 3)
    with pytest.raises(NoSuitableDevice, match=r"takes 2 GPUs from number 1 on, and this process may use 2"):
        devices("cuda:1", 2)


def test_gpus_of_another_model_and_those_that_others_use_come_last_or_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine((replace(H100, free=9800), B200, H100, H100)).install(tmp_path / "bin", monkeypatch)
    assert devices("cuda", 2).names == (uuid_of(2), uuid_of(3), uuid_of(0))
    Machine((H100_MIG,)).install(tmp_path / "bin", monkeypatch)
    assert devices("cuda").names == (instance_uuid(0, 0), instance_uuid(0, 1))
    with pytest.raises(NoSuitableDevice, match="one MIG instance at a time"):
        devices("cuda", 2)


def test_runs_of_all_users_find_one_file_that_each_may_lock(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o077)
    try:
        with hold([devices("cpu")], "", stage="", progress=quiet):
            assert stat.S_IMODE(devices("cpu").files[0].stat().st_mode) == 0o666
    finally:
        os.umask(before)
    monkeypatch.delenv("FP8PIPE_LOCKS")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    everyones = tmp_path / "run-lock"
    everyones.mkdir()
    monkeypatch.setattr(locks, "_LOCK_FOLDER", everyones)
    everyones.chmod(0o755)
    assert devices("cpu").files[0].parent == Path("/tmp")
    everyones.chmod(0o1777)
    assert devices("cpu").files[0].parent == everyones


def test_a_lock_that_is_no_file_of_ours_is_refused(folder: Path, tmp_path: Path) -> None:
    """In a folder that all users may write to, another could point to one of our files."""
    folder.mkdir()
    (lock,) = devices("cpu").files
    (tmp_path / "precious").write_text("precious")
    lock.symlink_to(tmp_path / "precious")
    with (
        pytest.raises(EnvironmentFault, match=r"fp8pipe-cpu\.lock: cannot be opened.*FP8PIPE_LOCKS"),
        hold([lock], "", stage="", progress=quiet),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "precious"
