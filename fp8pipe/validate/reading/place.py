"""Where a checkpoint lies: a folder, or a repository of the Hub that is read by HTTP ranges.

In: a path or a Snapshot. Out: a `Place` with names, sizes and bytes; the rest of the validator does not know which it
is. Files are compared by content hash, which the Hub knows without a download.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

from fp8pipe.hub import source
from fp8pipe.records import Snapshot

_LFS = b"version https://git-lfs"
_CHUNK = 1 << 20


class Place(Protocol):
    """Files by relative name."""

    sizes: dict[str, int]
    """Files at the top and below, outside hidden folders."""

    @property
    def root(self) -> Path | None:
        """Folder that holds the weights; None while they are only on the Hub."""
        ...

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end), fewer when the file is shorter."""
        ...

    def trouble(self, name: str) -> str | None:
        """Why `name` cannot hold weights: a link out of the folder, an LFS pointer, an empty file; else None."""
        ...


def same_content(ours: Place, theirs: Place, name: str) -> bool:
    """Whether both hold the same bytes under `name`. Files of the Hub are not fetched when their hash is known, and of
    `theirs`, which may be only a record of what was there, never then."""
    if ours.sizes[name] != theirs.sizes[name]:
        return False
    known = [oid for place in (theirs, ours) if isinstance(place, HubPlace) and (oid := place.oids.get(name))]
    kind = "sha256" if known and len(known[0]) == 64 else "git"
    return _hash(ours, name, kind) == _hash(theirs, name, kind)


def _hash(place: Place, name: str, kind: str) -> str:
    """sha256, or the sha1 of git's blob."""
    known = place.oids.get(name) if isinstance(place, HubPlace) else None
    if known is not None and len(known) == (64 if kind == "sha256" else 40):
        return known
    size = place.sizes[name]
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    for begin in range(0, size, _CHUNK):
        digest.update(place.read(name, begin, min(size, begin + _CHUNK)))
    return digest.hexdigest()


class FolderPlace:
    """A folder on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sizes = _list_files(root)

    def read(self, name: str, begin: int, end: int) -> bytes:
        return _read(self.root / name, begin, end)

    def trouble(self, name: str) -> str | None:
        path = self.root / name
        if path.is_symlink() and not path.exists():
            return "a link to nothing"
        if path.is_symlink() and not self._stays_inside(path):
            return f"a link to {path.readlink()}, outside the folder"
        if self.sizes[name] == 0:
            return "an empty file"
        return "a Git LFS pointer" if self.read(name, 0, len(_LFS)) == _LFS else None

    def _stays_inside(self, link: Path) -> bool:
        """Inside the folder, or in the blobs beside it when the folder is a snapshot of the Hub cache."""
        target, home = link.resolve(), self.root.resolve()
        cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        return target.is_relative_to(home) or target.is_relative_to(cache)


def _read(path: Path, begin: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def _list_files(root: Path) -> dict[str, int]:
    """Files and links; no pipe or device, since a read of one may never end."""
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder) / name for name in sorted(names)):
            if path.is_file() or (path.is_symlink() and not path.exists()):
                found[path.relative_to(root).as_posix()] = path.stat().st_size if path.exists() else 0
    return found


class HubPlace:
    """A repository at one commit, part of which may be in the cache. Raises HubUnreachable and AccessDenied while it is
    read."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.root = Path(snapshot.root) if snapshot.root is not None else None
        self.sizes = {
            file.name: file.size
            for file in snapshot.files
            if not any(part.startswith(".") for part in file.name.split("/"))
        }
        self.oids = {file.name: file.oid for file in snapshot.files}

    def read(self, name: str, begin: int, end: int) -> bytes:
        if self.root is not None and (self.root / name).is_file():
            return _read(self.root / name, begin, end)
        remote = self.snapshot.model_copy(update={"root": None})
        return source.read_range(remote, name, begin, min(end, self.sizes[name]))

    def trouble(self, name: str) -> str | None:
        if self.sizes[name] == 0:
            return "an empty file"
        return "a Git LFS pointer" if self.sizes[name] < 200 and self.read(name, 0, len(_LFS)) == _LFS else None


def place_of(model: Path | Snapshot) -> Place:
    """The place of a folder, or of a snapshot wherever it is."""
    if isinstance(model, Path):
        return FolderPlace(model)
    return FolderPlace(model.path) if model.is_local else HubPlace(model)
