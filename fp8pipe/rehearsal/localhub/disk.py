"""Files that are complete or absent: everything that the Hub writes goes through a temporary name and a rename.

The temporary folder is on the same file system as the state, so a rename is atomic, and a killed server leaves litter
in `tmp/` but never a half-written record.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO


def now() -> str:
    """The time now, in UTC, as the Hub writes it: 2026-01-31T12:00:00.000Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_json(path: Path) -> Any:
    """The parsed file. `Any` because JSON is."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: object, *, temporary: Path) -> None:
    """Replace `path` by the JSON of `value`, atomically. `temporary` is a folder on the same file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = temporary / secrets.token_hex(8)
    scratch.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    scratch.replace(path)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a commit."""

    sha256: str
    """sha256 of its bytes; the name of its blob."""
    size: int
    """Bytes."""
    oid: str
    """git's blob id: of the bytes for a regular file, of the pointer for an LFS file."""
    lfs: bool

    @property
    def etag(self) -> str:
        """What the Hub puts in `ETag`: the sha256 of an LFS file, git's id of a regular one."""
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer(self) -> bytes:
        """The LFS pointer file that git would hold."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


def git_blob_id(data: bytes) -> str:
    """git's name for a file with these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class WrongContent(ValueError):
    """The uploaded bytes differ from those that the client announced."""


class Blobs:
    """Contents by sha256, shared by all repositories, in `blobs/ab/<sha256>`."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self._folder = folder
        self._temporary = temporary

    def path(self, sha256: str) -> Path:
        """The path of a blob, which need not exist."""
        return self._folder / sha256[:2] / sha256

    def size(self, sha256: str) -> int | None:
        """Size of a blob in bytes; None if it does not exist."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def add(self, data: bytes) -> Entry:
        """Store the bytes of a regular file."""
        sha256 = hashlib.sha256(data).hexdigest()
        if self.size(sha256) != len(data):
            with Incoming(self, self._temporary) as incoming:
                incoming.write(data)
                incoming.keep(sha256, len(data))
        return Entry(sha256, len(data), git_blob_id(data), lfs=False)

    def lfs_entry(self, sha256: str) -> Entry | None:
        """The entry of an uploaded LFS file; None if its bytes never arrived."""
        size = self.size(sha256)
        if size is None:
            return None
        entry = Entry(sha256, size, "", lfs=True)
        return Entry(sha256, size, git_blob_id(entry.pointer), lfs=True)

    def receive(self) -> Incoming:
        """A new upload, to be used as a context manager."""
        return Incoming(self, self._temporary)


class Incoming:
    """An upload: its bytes are written and hashed as they come, and kept only if they are those announced."""

    def __init__(self, blobs: Blobs, temporary: Path) -> None:
        self._blobs = blobs
        self._scratch = temporary / secrets.token_hex(8)
        self._file: BinaryIO = self._scratch.open("xb")
        self._hash = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._scratch.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Append `data`."""
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def keep(self, sha256: str, size: int) -> None:
        """Make the bytes a blob. Raises WrongContent if their size or sha256 is not as announced."""
        if self._size != size:
            raise WrongContent(f"{sha256}: expected {size} bytes, {self._size} arrived; upload it again")
        if self._hash.hexdigest() != sha256:
            raise WrongContent(f"{sha256}: the bytes that arrived hash to {self._hash.hexdigest()}; upload it again")
        self._file.flush()
        target = self._blobs.path(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._scratch.replace(target)
