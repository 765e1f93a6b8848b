"""What makes a folder the folder it was: a digest cheap enough to take before and after every stage.

In: a model folder. Out: one hex digest over the content of the small files that decide how the model behaves, and over
the header, size and modification time of every safetensors file. No weight is read, so 100 GB cost milliseconds.
README, licence, records and dotfiles are no part of it: writing the card does not make a new checkpoint.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

BEHAVIOUR_PATTERNS = ("*.json", "*.jinja", "*.model", "*.py", "merges.txt", "vocab.txt")
"""Files at the top of the folder whose content is identity: configs, tokenizer, chat template, index, model code."""

_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself. More is not a header."""
_CHUNK = 1 << 20
"""Bytes of a file in hand at a time."""


def folder_identity(folder: Path) -> str:
    """sha256 hex of `folder` as it is now.

    Total: a missing config, a cut-off header or a broken length is hashed as found, since saying what is wrong is the
    work of validate. Raises FileNotFoundError only when a file vanishes while it is read.
    """
    digest = hashlib.sha256()
    for path in _sorted(folder, behaviour_files(folder)):
        _update_with_file(digest, path.relative_to(folder).as_posix(), path)
    for path in _sorted(folder, safetensors_files(folder)):
        stat = path.stat()
        size_and_time = f"{stat.st_size} {stat.st_mtime_ns}".encode()
        _update(digest, path.relative_to(folder).as_posix(), size_and_time + b"\n" + _header(path))
    return digest.hexdigest()


def behaviour_files(folder: Path) -> Iterator[Path]:
    """The small files whose content is identity, without dotfiles."""
    names = {path for pattern in BEHAVIOUR_PATTERNS for path in folder.glob(pattern)}
    return (path for path in names if path.is_file() and not path.name.startswith("."))


def safetensors_files(folder: Path) -> Iterator[Path]:
    """Every safetensors file below `folder`, outside hidden folders."""
    found = (path for path in folder.rglob("*.safetensors") if path.is_file())
    return (path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _header(path: Path) -> bytes:
    """Length field and header of a safetensors file, or what there is of them."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER))


def _sorted(folder: Path, paths: Iterator[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _update(digest: hashlib._Hash, name: str, content: bytes) -> None:
    """Name and content with their lengths, so that no two folders spell the same stream."""
    digest.update(f"{name}\0{len(content)}\0".encode())
    digest.update(content)


def _update_with_file(digest: hashlib._Hash, name: str, path: Path) -> None:
    """The same of a whole file, in pieces: a stranger's config.json may be of any size."""
    with path.open("rb") as file:
        digest.update(f"{name}\0{os.fstat(file.fileno()).st_size}\0".encode())
        while piece := file.read(_CHUNK):
            digest.update(piece)
