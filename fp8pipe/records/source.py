"""A model pinned to one state."""

from __future__ import annotations

from pathlib import Path

from fp8pipe.records.base import Record


class SourceFile(Record):
    """One file of a model repository or folder."""

    name: str
    """Path inside the repository, with forward slashes."""
    size: int
    """Bytes."""
    oid: str | None = None
    """The Hub's object id: sha256 for LFS files, git blob sha1 for others. In a local folder None; the record of a
    checkpoint that was made from one has the sha256 of the files that are copied."""


class Snapshot(Record):
    """A model pinned to one state."""

    model_id: str
    """Hub id, or the name of a local folder."""
    commit: str
    """Hub commit sha. For a folder: `local-` and a digest of its small files and weight headers, sizes and times."""
    files: tuple[SourceFile, ...]
    root: str | None = None
    """Folder with the files; None while they are only on the Hub. Not part of any identity."""

    @property
    def is_local(self) -> bool:
        """Whether the model was given as a folder."""
        return self.commit.startswith("local-")

    @property
    def path(self) -> Path:
        """The local folder of a downloaded snapshot."""
        assert self.root is not None, f"{self.model_id}@{self.commit} is not downloaded"
        return Path(self.root)
