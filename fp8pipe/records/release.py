"""How a release ended, and what it left on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from fp8pipe.config import Visibility
from fp8pipe.records.base import Record
from fp8pipe.records.checkpoint import FileHash
from fp8pipe.records.decision import GateDecision, Verdict


class Release(Record):
    """A checkpoint on the Hub, verified by reading it back. Part of the Outcome."""

    model_id: str
    source_commit: str
    recipe: str
    fingerprint: str
    verdict: Verdict
    endpoint: str
    repo_id: str
    repo_url: str
    visibility: Visibility
    """Who may see it."""
    visibility_note: str | None
    """Why that differs from what a person may expect."""
    commit: str
    tag: str
    collection_slug: str | None
    collection_url: str | None
    collection_note: str | None
    files: tuple[FileHash, ...]
    """The published files, each verified against the Hub's own checksum."""
    new_commit: bool
    """False if the Hub already had this content."""


class Outcome(Record):
    """How one release ended. `releases/.../release.json`."""

    verdict: Verdict | Literal["unsound"]
    """unsound: the validator found errors, and nothing was evaluated."""
    reason: str
    model_id: str
    source_commit: str
    recipe: str
    suite: str
    policy: str
    fingerprint: str
    source_bytes: int
    output_bytes: int
    decision: GateDecision | None
    release: Release | None
    """None if nothing was published."""
    notes: tuple[str, ...] = ()
    """Those of the plan."""

    @property
    def ending(self) -> str:
        """released, if it was published; otherwise the verdict."""
        return "released" if self.release is not None else self.verdict

    def kept(self, path: Path) -> Self:
        """Save the record and return it."""
        self.save(path)
        return self

    @property
    def exit_code(self) -> int:
        """Exit code of a command that ends like this: 0 if it was published, also by a person's decision."""
        return 0 if self.release is not None else VERDICT_EXIT_CODES[self.verdict]

    @property
    def falls_back(self) -> bool:
        """Whether the numbers rejected it, so that the next recipe may be tried. A veto never starts a fallback."""
        return self.verdict == "rejected" and self.decision is not None and not self.decision.vetoed


VERDICT_EXIT_CODES = {"accepted": 0, "rejected": 1, "unsound": 1, "inconclusive": 3}
"""Exit code of a command, by verdict."""


class BatchEntry(Record):
    """One release of a batch: its outcome, or the error that ended it."""

    model: str
    recipe: str
    repo_id: str
    exit_code: int
    outcome: Outcome | None
    error: str | None


class BatchResult(Record):
    """How every release of a collection ended."""

    collection: str
    entries: tuple[BatchEntry, ...]
