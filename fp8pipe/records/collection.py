"""A collection file beside the Hub: the state of each of its releases, and what its Hub collection lists otherwise."""

from __future__ import annotations

from typing import Literal

from fp8pipe.records.base import Record


class ReleaseStatus(Record):
    """The state of one model with one recipe."""

    model: str
    recipe: str
    state: str
    """How it ended, or how far it is: published | accepted | rejected | inconclusive | unsound | evaluated |
    validated | quantized | quantizing | missing; of the Hub alone: stale (the source moved since) | yanked."""
    fingerprint: str
    source_commit: str
    """Of what the state is about; empty if nothing was made of it yet."""
    detail: str


class CollectionChange(Record):
    """One item of a Hub collection that is to be added, removed, or shown with another note."""

    action: Literal["add", "update", "remove"]
    collection: str
    """As the file names it."""
    repo_id: str
    note: str | None
    """The note that it gets; None to keep the one that it has, or none."""
    why: str


class Reconciliation(Record):
    """What a file's Hub collections list otherwise than the file and the published releases say."""

    changes: tuple[CollectionChange, ...]
    missing: tuple[str, ...]
    """Releases of the file that are not on the Hub, and why: sentences."""
    kept: tuple[str, ...]
    """Items that fp8pipe has no say in, and why: sentences."""
    applied: bool
    """Whether the changes were made."""
