"""A digest of a model folder that is cheap enough to take before and after every stage.

It covers the content of the small files that decide how the model behaves, and the header, size and modification time
of every safetensors file. No weight is read, so 100 GB cost milliseconds. README, licence, records and dotfiles are
left out: writing the card does not make a new checkpoint.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

BEHAVIOUR_PATTERNS = ("*.json", "*.jinja", "*.model", "*.py", "merges.txt", "vocab.txt")
"""Files at the top of the folder whose content counts: configs, tokenizer, chat template, index, model code."""

_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself. Anything longer is no header."""
_CHUNK = 1 << 20
"""Bytes read at a time."""


def folder_identity(folder: Path) -> str:
    """sha256 hex of the state of `folder`.

    Never refuses a folder: a missing config, a truncated header or a wrong length is hashed as found, because reporting
    it is validate's task. Raises FileNotFoundError only if a file vanishes while it is read.
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
    """The small files whose content counts, without dotfiles."""
    names = {path for pattern in BEHAVIOUR_PATTERNS for path in folder.glob(pattern)}
    return (path for path in names if path.is_file() and not path.name.startswith("."))


def safetensors_files(folder: Path) -> Iterator[Path]:
    """Every safetensors file below `folder`, outside hidden folders."""
    found = (path for path in folder.rglob("*.safetensors") if path.is_file())
    return (path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _header(path: Path) -> bytes:
    """Length field and header of a safetensors file, or as much of them as there is."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), _MAX_HEADER))


def _sorted(folder: Path, paths: Iterator[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _update(digest: hashlib._Hash, name: str, content: bytes) -> None:
    """Add a name and a content. Their lengths go in too, so that no two folders give the same stream."""
    digest.update(f"{name}\0{len(content)}\0".encode())
    digest.update(content)


def _update_with_file(digest: hashlib._Hash, name: str, path: Path) -> None:
    """The same for a whole file, in pieces: a foreign config.json may have any size."""
    with path.open("rb") as file:
        digest.update(f"{name}\0{os.fstat(file.fileno()).st_size}\0".encode())
        while piece := file.read(_CHUNK):
            digest.update(piece)
