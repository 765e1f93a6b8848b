"""What every record is: frozen, strict, JSON, written last, so that its presence means complete."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from fp8pipe.errors import InputError
from fp8pipe.files import digest_of, write_atomically

RECORD_DIR = "fp8pipe"
"""Folder inside a checkpoint that holds its records."""


class Record(BaseModel):
    """Base of all records: frozen, strict about unknown keys, saved atomically."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path) -> Path:
        """Write as JSON under a temporary name, fsync, rename: a reader sees all of it or none."""
        write_atomically(path, self.model_dump_json(indent=1).encode() + b"\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read back; a file that is not this record raises InputError naming the path."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{path}: no such record; run the stage that writes it") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: not a {cls.__name__} record: {where}: {first['msg']}") from error

    @classmethod
    def load_if_present(cls, path: Path) -> Self | None:
        """The record, or None when it was never finished (or was written by an incompatible version)."""
        try:
            return cls.load(path)
        except InputError:
            return None

    def digest(self) -> str:
        """sha256 of the canonical JSON: equal content, equal digest."""
        return digest_of(self.model_dump(mode="json"))
