"""What a run has finished, one line each, so that after kill -9 no tensor is quantized twice.

A line is appended after the bytes it speaks of were handed to the kernel, which keeps them when the process dies.
They may be lost when the machine dies: a journal of another boot counts only for shards that were renamed, after
their fsync. A line cut off by the kill is not a line."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from fp8pipe.errors import InputError
from fp8pipe.files import disk_errors, write_atomically

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """`DIR/fp8pipe/quantize.journal`. Open it with `open_journal`."""

    def __init__(self, path: Path, entries: list[dict[str, Any]]) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self.finished: set[str] = {entry["weight"] for entry in entries if "weight" in entry}
        """Names of output tensors whose bytes are all written."""
        self.zero_units: list[str] = [unit for entry in entries for unit in entry.get("zeros", ())]
        self.amax: dict[str, float] = {e["unit"]: float.fromhex(e["amax"]) for e in entries if "amax" in e}
        """Range of each unit that was measured, by name of its first weight."""

    def add_finished(self, name: str, zeros: list[str]) -> None:
        """All bytes of output tensor `name` are written; `zeros`: its scale units without a weight other than 0."""
        with self._lock:
            self.zero_units += zeros
        self._append({"weight": name, "zeros": zeros})

    def add_amax(self, unit: str, amax: float) -> None:
        """The unit was measured: `amax`, after the observer."""
        self._append({"unit": unit, "amax": amax.hex()})

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with disk_errors(self.path):
            if os.write(self._handle, line) < len(line):  # one write: lines of threads do not mix
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """All lines so far are on disk when this returns."""
        with disk_errors(self.path):
            os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


def void_unless(path: Path, identity: str) -> tuple[str, ...] | None:
    """None for the journal of the run called `identity`; that of another run is made void, and names its files.

    To be done before those files are removed: whoever is killed in between leaves a journal that no run goes on with,
    and that still names them."""
    head = _head(path)
    if head.get("identity") == identity:
        return None
    files = head.get("files")
    names = [name for name in files if _is_inside(name)] if isinstance(files, list) else []
    if path.exists():
        _write(path, [{"identity": None, "files": names}])
    return tuple(names)


def open_journal(path: Path, identity: str, *, files: Iterable[str], is_safe: Callable[[str], bool]) -> Journal:
    """The journal of the run called `identity`, which goes on with what the file says it has finished.

    `files`: names of all that the run writes beside its records. `is_safe(name)`: the shard of output tensor `name`
    was renamed, so its bytes are on disk even if the machine died."""
    head, *entries = _read(path) or [{}]
    if head.get("identity") != identity:
        entries = []
    elif head.get("boot") != _boot():
        entries = [entry for entry in entries if "weight" in entry and is_safe(entry["weight"])]
    _write(path, [{"identity": identity, "boot": _boot(), "files": sorted(files)}, *entries])
    return Journal(path, entries)


def _head(path: Path) -> dict[str, Any]:
    return next(iter(_read(path)), {})


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def _is_inside(name: Any) -> bool:
    """Whether this is a file of the folder itself: what a journal names is removed."""
    return isinstance(name, str) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        lines.append(entry)
    return lines


def _boot() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


class FolderLock:
    """One writer per folder: a second one is told so."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise InputError(f"{path.parent.parent}: another run is writing this checkpoint; wait for it") from None

    def release(self) -> None:
        os.close(self._handle)
