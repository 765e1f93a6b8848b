"""Reading and writing the bytes of safetensors files: reads that notice changes, writes at planned offsets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from fp8pipe.errors import DiskTooSmall, EnvironmentFault, SourceChanged
from fp8pipe.files import disk_errors
from fp8pipe.model.headers import TensorInfo, header_bytes


class SourceFiles:
    """Unbuffered reads at given offsets from a model's files, which must not change once they are open."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self._root = root
        self._stack = stack
        self._files: dict[str, int] = {}
        self._states: dict[str, tuple[int, ...]] = {}

    @property
    def names(self) -> set[str]:
        """Names of the open files."""
        return set(self._files)

    def open(self, name: str) -> None:
        """Open a file and remember its state; the constructor's `stack` closes it. Raises EnvironmentFault."""
        try:
            handle = os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise EnvironmentFault(f"{self._root / name}: cannot open: {error.strerror}") from error
        self._stack.callback(os.close, handle)
        self._states[name] = _state(os.fstat(handle))
        self._files[name] = handle

    def read_into(self, shard: str, offset: int, buffer: memoryview, what: str) -> None:
        """Fill `buffer` from byte `offset` of `shard`; `what` names the tensor in errors.

        Raises EnvironmentFault if the disk cannot be read, SourceChanged if the file is shorter than it was."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._files[shard], [buffer[done:]], offset + done)
            except OSError as error:
                place = f"{self._root / shard} at byte {offset + done}"
                raise EnvironmentFault(f"{what}: cannot read {place}: {error.strerror}; check the disk") from error
            if count == 0:
                raise SourceChanged(f"{what}: {shard} ends at byte {offset + done}; it was truncated while it was read")
            done += count

    def will_need(self, shard: str, begin: int, end: int) -> None:
        """Have the kernel start reading these bytes, so that they are in the page cache when they are asked for."""
        os.posix_fadvise(self._files[shard], begin, end - begin, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self, shard: str) -> None:
        """Raise SourceChanged if the open file, or what its path now names, is no longer what was opened."""
        try:
            now = _state((self._root / shard).stat())
        except FileNotFoundError:
            raise SourceChanged(f"{self._root / shard} was removed while it was read; run again") from None
        if not _state(os.fstat(self._files[shard])) == now == self._states[shard]:
            raise SourceChanged(
                f"{self._root / shard} was changed while it was read; run again when nothing writes to it"
            )


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


class OutputShard:
    """One file of the checkpoint: written at planned offsets under a temporary name, renamed when it is complete."""

    def __init__(self, path: Path, tensors: Sequence[TensorInfo], stack: ExitStack) -> None:
        self.path = path
        self.partial = partial_path(path)
        first = min((info.begin for info in tensors), default=0)
        header = header_bytes(tensors, first) if tensors else header_bytes((), 0)
        self.size = max((info.end for info in tensors), default=len(header))
        assert len(header) == (first or len(header)), f"{path.name}: header and plan disagree"
        with disk_errors(path):
            self._handle = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, self._handle)
            os.posix_fallocate(self._handle, 0, self.size)
            os.ftruncate(self._handle, self.size)  # an earlier run may have left a longer one
        self.write_at(0, memoryview(header))

    def write_at(self, offset: int, data: memoryview, what: str = "") -> None:
        """Write all of `data` at byte `offset`; `what` names the tensor in errors."""
        done = 0
        with disk_errors(self.path, what):
            while done < len(data):
                done += os.pwrite(self._handle, data[done:], offset + done)

    def start_flush(self, begin: int, end: int) -> None:
        """Have the kernel start writing this range to disk, so that the final fsync has little left to do."""
        os.posix_fadvise(self._handle, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        """fsync the bytes, then give the file its name."""
        with disk_errors(self.path):
            os.fsync(self._handle)
            self.partial.replace(self.path)


def partial_path(path: Path) -> Path:
    """Where the bytes of `path` are until it is complete: hidden, and without a suffix that a loader looks for."""
    return path.with_name(f".{path.name}.partial")


def require_disk(folder: Path, shards: Iterable[str], needed: int) -> None:
    """Raise DiskTooSmall unless `shards`, `needed` bytes in all, fit on the disk of `folder`.

    What `folder` already holds of them counts as free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    own = [*folder.glob(".*.partial"), *(folder / name for name in shards)]
    held = sum(path.stat().st_blocks * 512 for path in own if path.is_file())
    free = shutil.disk_usage(existing).free
    if needed - held > free:
        raise DiskTooSmall(
            f"{folder}: the checkpoint takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space or choose an output folder on another disk"
        )


def sync_folder(folder: Path) -> None:
    """fsync a directory, so that renames in it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
