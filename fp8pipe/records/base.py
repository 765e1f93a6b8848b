"""The base of all records: frozen, strict about unknown keys, saved as JSON."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from fp8pipe.errors import InputError
from fp8pipe.files import digest_of, write_atomically

RECORD_DIR = "fp8pipe"
"""Folder of the records inside a checkpoint folder."""

MAX_UNPACKED = 1 << 28
"""Bytes of a compressed record: a report has some 300 for each sample. What is larger was not written by a stage."""


class Record(BaseModel):
    """A frozen JSON document. It is written last and atomically, so its presence means that its stage is complete.

    A record whose file name ends in `.gz` is compressed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path) -> Path:
        """Write atomically: a reader sees the whole record or none."""
        content = self.model_dump_json(indent=1).encode() + b"\n"
        write_atomically(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the record at `path`. Raises InputError if there is none or it is something else."""
        try:
            content = path.read_bytes()
            return cls.model_validate_json(_unpacked(path, content) if path.suffix == ".gz" else content)
        except FileNotFoundError:
            raise InputError(f"{path}: no such record; run the stage that writes it") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: not a {cls.__name__} record: {where}: {first['msg']}") from error

    @classmethod
    def load_if_present(cls, path: Path) -> Self | None:
        """Read the record at `path`; None if it was never finished, or written by an incompatible version."""
        try:
            return cls.load(path)
        except InputError:
            return None

    def digest(self) -> str:
        """sha256 hex of the canonical JSON: equal records have equal digests."""
        return digest_of(self.model_dump(mode="json"))


def _unpacked(path: Path, content: bytes) -> bytes:
    """The JSON in a compressed record. Raises InputError if it is none, or would not end."""
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # 16: gzip
    try:
        unpacked = unpacker.decompress(content, MAX_UNPACKED)
    except zlib.error as error:
        raise InputError(f"{path}: not a compressed record: {error}") from error
    if not unpacker.eof:
        raise InputError(f"{path}: not a compressed record: it is cut off, or larger than {MAX_UNPACKED:,} bytes")
    return unpacked
