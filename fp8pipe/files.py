"""What lands on disk: canonical JSON and its digest, writes that are whole or absent, errors that say why."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fp8pipe.errors import DiskTooSmall, EnvironmentFault


def digest_of(value: Any) -> str:
    """sha256 hex of a JSON value with sorted keys and no spaces; what JSON cannot hold is refused loudly."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def disk_errors(path: Path, what: str = "") -> Iterator[None]:
    """Turn an OSError while writing `path` into DiskTooSmall or EnvironmentFault. what: the tensor, if it is one."""
    try:
        yield
    except OSError as error:
        where = f"{path}: {what}" if what else f"{path}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskTooSmall(
                f"{where}: the disk is full; free some space and run again; what is finished is kept"
            ) from error
        raise EnvironmentFault(f"{where}: cannot write: {error.strerror or error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name in the same folder, fsync, rename, and fsync the folder.

    Raises DiskTooSmall if the disk is full, EnvironmentFault if it cannot be written."""
    with disk_errors(path):
        _write_atomically(path, data)


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes files that only their owner may read
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
