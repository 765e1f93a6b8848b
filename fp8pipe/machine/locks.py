"""Locks that runs of this host wait for: one for each device, and one for each folder that several runs may fill.

A lock is flock(2) on a file, so the kernel frees it with the last process that has it: nothing is left by a run that
was killed. The run waits and locks before it starts the process that uses the device, and hands the open descriptor to
`supervise`, whose guard and command keep copies of it. So a wait costs no process and is no stall; the lock outlives a
run that is killed, until its processes are gone from the device; and it covers all processes that a run starts one
after the other. Nobody ever unlocks, because that would free all copies: they are closed.

The file says who has it. It stays when the lock is free, since removing it would let two runs lock two files.

Files of devices are in /run/lock, where the folder lets all users write (mode 1777), else in /tmp: every run of the
host, of whichever user, has to find the same file, which rules out $TMPDIR, $XDG_RUNTIME_DIR and home folders, and a
restart has to leave none. Containers that share a device mount one folder and name it in FP8PIPE_LOCKS.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fp8pipe.errors import EnvironmentFault
from fp8pipe.machine.gpus import nth
from fp8pipe.progress import Progress, ProgressEvent

_POLL_S = 0.3
_LOCK_FOLDER = Path("/run/lock")

_log = logging.getLogger(__name__)


def device_locks(device: str, count: int = 1) -> tuple[Path, ...]:
    """The lock files of a process's devices: `cpu`, or `count` GPUs (or MIG instances) from `device` on, which is cuda
    or cuda:<n> as the process numbers them. Named by UUID, since two runs may number them differently.

    Raises NoSuitableDevice if there are not as many.
    """
    names = ["cpu"] if device == "cpu" else sorted(gpu.uuid for gpu in nth(device, count))
    return tuple(_folder() / f"fp8pipe-{name}.lock" for name in names)


def folder_lock(folder: Path) -> Path:
    """The lock file of a folder that is one stage's, such as that of a baseline which several releases share."""
    return folder / "lock"


@contextmanager
def hold(paths: Sequence[Path], work: str, *, stage: str, progress: Progress) -> Iterator[tuple[int, ...]]:
    """Hold these locks; yields their descriptors, for the processes that share them.

    work: what for, in a few words, for those who wait. They are locked in the given order, which all callers share:
    folders before devices, devices by name. While another run has one, `progress` and the log say which.
    Raises EnvironmentFault for a file that cannot be locked.
    """
    held: list[int] = []
    wait = _Wait(stage, progress)
    try:
        for path in paths:
            held.append(_locked(path, wait))
            _Note(os.getpid(), socket.gethostname(), work, time.time()).write(held[-1])
        wait.end()
        yield tuple(held)
    finally:
        for descriptor in held:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Note:
    """Who has a lock, as its file says."""

    pid: int
    host: str
    work: str
    since: float
    """Unix time in seconds."""

    def write(self, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(self)).encode(), 0)

    @classmethod
    def read(cls, descriptor: int) -> _Note | None:
        """None while the next holder is about to write."""
        with suppress(ValueError, TypeError):
            return cls(**json.loads(os.pread(descriptor, 65536, 0)))
        return None

    def __str__(self) -> str:
        pid = f"pid {self.pid}" + ("" if self.host == socket.gethostname() else f" on {self.host}")
        return f"{pid} ({self.work}) since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.since))}"


@dataclass(slots=True)
class _Wait:
    """Tells of a wait: the log once for each holder, the listener all the time."""

    stage: str
    progress: Progress
    told: str = ""

    def on(self, path: Path, holder: _Note | None) -> None:
        if holder is None and self.told:
            return
        text = f"waiting for {_device_of(path) or path.parent}, in use by {holder or 'another run'}"
        if text != self.told:
            self.told = text
            _log.warning("%s: %s", self.stage, text)
        self.progress(ProgressEvent(self.stage, 0, None, note=text, waiting=True))

    def end(self) -> None:
        if self.told:
            self.progress(ProgressEvent(self.stage, 0, None))


def _device_of(path: Path) -> str | None:
    return path.stem.removeprefix("fp8pipe-") if path.suffix == ".lock" else None


def _folder() -> Path:
    own = os.environ.get("FP8PIPE_LOCKS")
    if own:
        return Path(own)
    with suppress(OSError):
        if stat.S_IMODE(_LOCK_FOLDER.stat().st_mode) == 0o1777:
            return _LOCK_FOLDER
    return Path("/tmp")


def _locked(path: Path, wait: _Wait) -> int:
    """A descriptor of the file at `path`, locked as soon as nobody else has it."""
    while True:
        descriptor = _opened(path)
        try:
            while not _try_lock(path, descriptor):
                wait.on(path, _Note.read(descriptor))
                time.sleep(_POLL_S)
            if _is_at(path, descriptor):
                return descriptor
            os.close(descriptor)  # someone has cleaned the folder meanwhile: the file that counts is another
        except BaseException:
            os.close(descriptor)
            raise


def _try_lock(path: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            return False
        raise EnvironmentFault(f"{path}: cannot be locked ({error.strerror}); use a file system that can") from error
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _opened(path: Path) -> int:
    """The file, for every user to lock; made if there is none.

    It is not opened with O_CREAT where it exists: in a folder such as /tmp, Linux then refuses the files of others
    (fs.protected_regular).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        with suppress(FileNotFoundError):
            return os.open(path, flags)
        with suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            os.fchmod(descriptor, 0o666)  # whatever the umask is
            return descriptor
        return os.open(path, flags)
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: cannot be opened for reading and writing ({error.strerror}); let every user who shares the "
            "device do so, or name a folder for such files in FP8PIPE_LOCKS"
        ) from error
