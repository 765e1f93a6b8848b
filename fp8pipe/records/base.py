"""The base of all records: frozen, strict about unknown keys, saved as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from fp8pipe.errors import InputError
from fp8pipe.files import digest_of, write_atomically

RECORD_DIR = "fp8pipe"
"""Folder of the records inside a checkpoint folder."""


class Record(BaseModel):
    """A frozen JSON document. It is written last and atomically, so its presence means that its stage is complete."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path) -> Path:
        """Write atomically: a reader sees the whole record or none."""
        write_atomically(path, self.model_dump_json(indent=1).encode() + b"\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the record at `path`. Raises InputError if there is none or it is something else."""
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
        """Read the record at `path`; None if it was never finished, or written by an incompatible version."""
        try:
            return cls.load(path)
        except InputError:
            return None

    def digest(self) -> str:
        """sha256 hex of the canonical JSON: equal records have equal digests."""
        return digest_of(self.model_dump(mode="json"))
