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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fp8pipe.errors import InputError
from fp8pipe.records import disk_errors, write_atomically

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


def open_journal(path: Path, identity: str, *, is_safe: Callable[[str], bool]) -> tuple[Journal, bool]:
    """The journal of the run called `identity`, and whether it goes on with an earlier one.

    `is_safe(name)`: the shard of output tensor `name` was renamed, so its bytes are on disk even if the machine died.
    """
    head, *entries = _read(path) or [{}]
    goes_on = head.get("identity") == identity
    if not goes_on:
        entries = []
    elif head.get("boot") != _boot():
        entries = [entry for entry in entries if "weight" in entry and is_safe(entry["weight"])]
    lines = [{"identity": identity, "boot": _boot()}, *entries]
    write_atomically(path, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    return Journal(path, entries), goes_on


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
