"""A list of what a run has finished, so that no tensor is quantized twice after kill -9.

A line is appended once the kernel has the bytes that it reports, and the kernel keeps them if the process dies. If the
machine dies they may be lost, so a journal of another boot counts only for shards that were renamed after their fsync.
A line that was cut off is ignored."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fp8pipe.files import disk_errors, write_atomically

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """`DIR/fp8pipe/quantize.journal`, opened by `open_journal`."""

    def __init__(self, path: Path, entries: list[dict[str, Any]]) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self.finished: set[str] = {entry["weight"] for entry in entries if "weight" in entry}
        """Names of the output tensors that earlier runs wrote completely."""
        self.zero_units: list[str] = [unit for entry in entries for unit in entry.get("zeros", ())]
        self.faint_units: list[str] = [unit for entry in entries for unit in entry.get("faint", ())]
        self.ranges: dict[str, tuple[float, list[float]]] = {
            e["unit"]: (float.fromhex(e["amax"]), [float.fromhex(own) for own in e["own"]])
            for e in entries
            if "amax" in e
        }
        """Range of each measured unit, and amax of each of its weights, by the name of its first weight."""

    def add_finished(self, name: str, zeros: Sequence[str], faint: Sequence[str]) -> None:
        """Note that output tensor `name` is written; `zeros`, `faint`: its scale units that hold only zeros, and those
        too small for any code but zero."""
        with self._lock:
            self.zero_units += zeros
            self.faint_units += faint
        self._append({"weight": name, "zeros": [*zeros], "faint": [*faint]})

    def add_range(self, unit: str, amax: float, own: Sequence[float]) -> None:
        """Note the range of `unit`, as the observer has chosen it, and the largest magnitude of each of its weights."""
        self._append({"unit": unit, "amax": amax.hex(), "own": [one.hex() for one in own]})

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with disk_errors(self.path):
            if os.write(self._handle, line) < len(line):  # in one write, so that lines of threads do not mix
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Write all lines so far to disk."""
        with disk_errors(self.path):
            os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


def void_unless(path: Path, identity: str) -> tuple[str, ...] | None:
    """None if the journal belongs to the run `identity`; else void it and return the files it names, to be removed.

    Call it before those files are removed: a kill in between then leaves a journal that no run resumes from and that
    still names them."""
    head = _head(path)
    if head.get("identity") == identity:
        return None
    files = head.get("files")
    names = [name for name in files if _is_inside(name)] if isinstance(files, list) else []
    if path.exists():
        _write(path, [{"identity": None, "files": names}])
    return tuple(names)


def open_journal(path: Path, identity: str, *, files: Iterable[str], is_safe: Callable[[str], bool]) -> Journal:
    """The journal of the run `identity`, with what earlier attempts have finished.

    `files`: names of all files that the run writes beside its records. `is_safe(name)`: whether the shard of output
    tensor `name` was renamed, so that its bytes are on disk even if the machine died."""
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
    """Whether this names a file inside the folder, for the files that a journal names are removed."""
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
