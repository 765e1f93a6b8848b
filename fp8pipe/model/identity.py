"""What a folder is: the hashes of its files, the identity of a checkpoint, and the state of a source.

published_files   what a release uploads
file_hashes       sha256 of such files, each taken once per machine
folder_identity   of a checkpoint: the content of all that is published, but records and card; a copy is the same
folder_state      of a local source: small files whole, weights by header, size and time; milliseconds for 100 GB
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fp8pipe.errors import EnvironmentFault, InputError, SourceChanged
from fp8pipe.files import digest_of, write_atomically
from fp8pipe.records import RECORD_DIR, RECORD_FILES, FileHash

CARD = "README.md"
SIGNATURE = "model.sig"
"""Written by the release, from the evidence and over it."""
RESULTS = ".eval_results/"
"""Folder of the results that the Hub's leaderboards read. Written by the release; the only hidden one of it."""

KEPT_PRIVATE = (
    *("*.tmp", "*.part", "*.partial", "*.incomplete", "*.lock", "*.log", "*.journal", "*.pyc"),
    f"{RECORD_DIR}/release.json",
)
"""Never published, like everything else that is hidden: unfinished files, traces of this machine, and the record of
the upload."""

BEHAVIOUR_PATTERNS = ("*.json", "*.jinja", "*.model", "*.py", "merges.txt", "vocab.txt")
"""Files at the top of a source whose content counts: configs, tokenizer, chat template, index, model code."""

_CACHE = f"{RECORD_DIR}/.hashes.json"
"""Hashes that were taken on this machine, beside the records of a checkpoint. Other folders get no file of ours."""
_FRESH_NS = 100_000_000
"""A file that changed this recently could change again at the same time stamp, so its hash is not remembered."""
_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself. Anything longer is no header."""
_CHUNK = 1 << 20
"""Bytes read at a time."""

# ------------------------------------------------------------------------------------------ a checkpoint


def folder_identity(folder: Path) -> str:
    """sha256 hex of the content of the checkpoint in `folder`: every file that is published, but records and card.

    Reads what is not yet hashed. Never refuses a folder: reporting what is wrong with it is validate's task. Raises
    SourceChanged if a file changes while it is read.
    """
    return identity_of(content_hashes(folder))


def content_hashes(folder: Path) -> tuple[FileHash, ...]:
    """The hashes of the files that make up the checkpoint in `folder`, as its identity has them."""
    return file_hashes(folder, filter(is_content, published_files(folder)))


def identity_of(files: Iterable[FileHash]) -> str:
    """The identity of a checkpoint with these published files, wherever it lies."""
    return digest_of(sorted((file.name, file.size, file.sha256) for file in files if is_content(file.name)))


def is_content(name: str) -> bool:
    """Whether this published file belongs to the checkpoint, and is not a record, result, the card or the signature."""
    return name not in {CARD, SIGNATURE} and not name.startswith((f"{RECORD_DIR}/", RESULTS))


def published_files(folder: Path) -> list[str]:
    """Names of the files that a release of `folder` uploads, sorted; links among them, which publishing refuses."""
    return _named(folder, Path.is_file)


def links(folder: Path) -> list[str]:
    """Names of the links among what is not private in `folder`, to files, folders or nothing."""
    return _named(folder, Path.is_symlink)


def _named(folder: Path, wanted: Callable[[Path], bool]) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if wanted(path))
    return sorted(name for name in names if not _is_private(name))


def _is_private(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.removeprefix(RESULTS).split("/"))
    return hidden or any(fnmatch(name, pattern) for pattern in KEPT_PRIVATE)


def file_hashes(folder: Path, names: Iterable[str]) -> tuple[FileHash, ...]:
    """The hash of each of these files. A file that this machine hashed before, and that has not changed since by its
    inode, size and both times, is not read again. Raises SourceChanged if one changes or vanishes meanwhile."""
    path = folder / _CACHE
    known = _remembered(path)
    with ThreadPoolExecutor(thread_name_prefix="sha256") as pool:
        hashed = list(pool.map(lambda name: _hashed(folder, name, known), names))
    fresh = {file.name: [list(stamp), file.sha256] for file, stamp in hashed if stamp is not None}
    ours = (path.parent / RECORD_FILES["checkpoint"]).is_file()
    if ours and any(known.get(name) != entry for name, entry in fresh.items()):
        with contextlib.suppress(EnvironmentFault):  # what cannot be remembered is read again
            write_atomically(path, json.dumps(known | fresh).encode())
    return tuple(file for file, _ in hashed)


_Stamp = tuple[int, int, int, int]
"""Inode, size, and the times of the last change of content and of the inode, in ns. No program can set the last."""


def _remembered(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _hashed(folder: Path, name: str, known: dict[str, Any]) -> tuple[FileHash, _Stamp | None]:
    """The file's hash, and the stamp by which it may be remembered; None if it is too fresh for that."""
    path, begin = folder / name, time.time_ns()
    changed = f"{path}: changed while it was read; run again once nothing writes to the folder"
    try:
        with path.open("rb") as file:
            stamp = _stamp(file.fileno())
            match known.get(name):
                case [list() as seen, str() as remembered] if tuple(seen) == stamp:
                    sha256 = remembered
                case _:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if _stamp(file.fileno()) != stamp:
                raise SourceChanged(changed)
    except FileNotFoundError as error:
        raise SourceChanged(changed) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; make it readable") from error
    sayable = name.encode(errors="backslashreplace").decode()  # a file may have a name that no JSON can hold
    file_hash = FileHash(name=sayable, size=stamp[1], sha256=sha256)
    return file_hash, stamp if begin - stamp[3] > _FRESH_NS else None


def _stamp(handle: int) -> _Stamp:
    stat = os.fstat(handle)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


# ------------------------------------------------------------------------------------------ a source


def folder_state(folder: Path) -> str:
    """sha256 hex of the state of the model in `folder`: the content of the small files that decide how it behaves, and
    header, size and modification time of every safetensors file. No weight is read, so a plan costs milliseconds.

    README, licence, records and dotfiles are left out. Never refuses a folder: a missing config, a truncated header or
    a wrong length is hashed as found. Raises FileNotFoundError only if a file vanishes while it is read.
    """
    digest = hashlib.sha256()
    for path in _sorted(folder, _behaviour_files(folder)):
        _update_with_file(digest, path.relative_to(folder).as_posix(), path)
    for path in _sorted(folder, _safetensors_files(folder)):
        stat = path.stat()
        size_and_time = f"{stat.st_size} {stat.st_mtime_ns}".encode()
        _update(digest, path.relative_to(folder).as_posix(), size_and_time + b"\n" + _header(path))
    return digest.hexdigest()


def _behaviour_files(folder: Path) -> Iterator[Path]:
    """The small files whose content counts, without dotfiles."""
    names = {path for pattern in BEHAVIOUR_PATTERNS for path in folder.glob(pattern)}
    return (path for path in names if path.is_file() and not path.name.startswith("."))


def _safetensors_files(folder: Path) -> Iterator[Path]:
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
