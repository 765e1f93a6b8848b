"""Locks that runs of this host wait for: one for each device, and one for each folder that several runs may fill.

A lock is flock(2) on a file, so the kernel frees it with the last process that has it: nothing is left by a run that
was killed. The run waits and locks before it starts the process that uses the device, and hands the open descriptor to
`supervise`, whose guard and command keep copies of it. So a wait costs no process and is no stall; the lock outlives a
run that is killed, until its processes are gone from the device; and it covers all processes that a run starts one
after the other. Nobody ever unlocks, because that would free all copies: they are closed.

On a host with several GPUs a run takes as many as it needs of those that are free, all at once or none: it never waits
with one in hand that another waits for. Its child sees these alone.

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
import random
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fp8pipe.errors import EnvironmentFault
from fp8pipe.machine.fit import is_busy
from fp8pipe.machine.gpus import of_device
from fp8pipe.progress import Progress, ProgressEvent

_POLL_S = 0.3
_LOCK_FOLDER = Path("/run/lock")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Devices:
    """Devices of one kind, of which a run takes `count`."""

    names: tuple[str, ...]
    """UUIDs of GPUs or MIG instances, those first that are taken first; or `cpu`."""
    count: int = 1

    @property
    def files(self) -> tuple[Path, ...]:
        """Their lock files. Named by UUID, since two runs may number the devices differently."""
        return tuple(_folder() / f"fp8pipe-{name}.lock" for name in self.names)


def devices(device: str, count: int = 1) -> Devices:
    """`cpu`; or for `cuda` any `count` GPUs (or one MIG instance) that this process may use, those first on which
    nobody holds memory; for `cuda:<n>` exactly those from number n on, as the process numbers them.

    Raises NoSuitableDevice if there are not as many.
    """
    if device == "cpu":
        return Devices(("cpu",))
    return Devices(tuple(gpu.uuid for gpu in sorted(of_device(device, count), key=is_busy)), count)


def folder_lock(folder: Path) -> Path:
    """The lock file of a folder that is one stage's, such as that of a baseline which several releases share."""
    return folder / "lock"


@dataclass(frozen=True, slots=True)
class Held:
    """What a run has locked, for the processes that share it."""

    locks: tuple[int, ...] = ()
    """Descriptors."""
    gpus: tuple[str, ...] = ()
    """UUIDs."""

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables that show a process these GPUs alone, as cuda:0, cuda:1, ..."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}


@contextmanager
def hold(wanted: Sequence[Path | Devices], work: str, *, stage: str, progress: Progress) -> Iterator[Held]:
    """Hold these locks.

    work: what for, in a few words, for those who wait. They are locked in the given order, which all callers share:
    folders before devices. While others have them, `progress` and the log say who.
    Raises EnvironmentFault for a file that cannot be locked.
    """
    held: list[int] = []
    gpus: list[str] = []
    wait = _Wait(stage, progress)
    try:
        for one in wanted:
            files, count = (one.files, one.count) if isinstance(one, Devices) else ((one,), 1)
            taken = _locked(files, count, wait)
            held += taken.values()
            gpus += [name for path in taken if (name := _device_of(path)) and name != "cpu"]
            note = _Note(os.getpid(), socket.gethostname(), work, time.time())
            for descriptor in taken.values():
                note.write(descriptor)
        wait.end()
        yield Held(tuple(held), tuple(gpus))
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

    def on(self, files: Sequence[Path], count: int, busy: Mapping[Path, _Note | None]) -> None:
        if None in busy.values() and self.told:
            return
        what = str(_device_of(files[0]) or files[0].parent)
        if len(files) > 1:
            what = f"{count} of {len(files)} GPUs, {len(files) - len(busy)} of which are free"
        text = f"waiting for {what}, in use by " + "; ".join(
            dict.fromkeys(str(holder or "another run") for holder in busy.values())
        )
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


def _locked(files: Sequence[Path], count: int, wait: _Wait) -> dict[Path, int]:
    """`count` of the files with their descriptors, locked as soon as nobody else has them."""
    while True:
        taken: dict[Path, int] = {}
        busy: dict[Path, _Note | None] = {}
        try:
            for path in files:
                found = _lock_now(path)
                if isinstance(found, int):
                    taken[path] = found
                else:
                    busy[path] = found
                if len(taken) == count:
                    return taken
        finally:
            if len(taken) < count:  # whoever keeps some of them might wait for one who has the others
                for descriptor in taken.values():
                    os.close(descriptor)
        wait.on(files, count, busy)
        time.sleep(_POLL_S * random.uniform(0.5, 1.5))  # two who disturbed each other do not do so again


def _lock_now(path: Path) -> int | _Note | None:
    """A descriptor of the file at `path`, locked; else who has it, or None while that is not told."""
    while True:
        descriptor = _opened(path)
        locked = False
        try:
            if not _try_lock(path, descriptor):
                return _Note.read(descriptor)
            locked = _is_at(path, descriptor)
            if locked:
                return descriptor
        finally:
            if not locked:  # someone else has it; or has cleaned the folder meanwhile: the file that counts is another
                os.close(descriptor)


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
