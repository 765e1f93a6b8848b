"""How a release ended, and what is on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from fp8pipe.records.base import Record
from fp8pipe.records.checkpoint import FileHash
from fp8pipe.records.decision import GateDecision, Verdict


class Release(Record):
    """A checkpoint on the Hub, proven by re-reading it. `release.json`."""

    model_id: str
    source_commit: str
    recipe: str
    fingerprint: str
    verdict: Verdict
    endpoint: str
    repo_id: str
    repo_url: str
    commit: str
    tag: str
    collection_slug: str | None
    collection_url: str | None
    collection_note: str | None
    files: tuple[FileHash, ...]
    """What the Hub was asked to hold, each verified against the Hub's own checksums."""
    new_commit: bool
    """False when the Hub already held these bytes."""


class Outcome(Record):
    """How one release ended, whichever way. `releases/.../release.json`."""

    verdict: Verdict | Literal["unsound"]
    """unsound: the validator found errors, so nothing was evaluated."""
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
    """None unless it was published."""

    @property
    def ending(self) -> str:
        """released, whoever decided it; else the verdict."""
        return "released" if self.release is not None else self.verdict

    def kept(self, path: Path) -> Self:
        """Itself, once it is saved."""
        self.save(path)
        return self

    @property
    def exit_code(self) -> int:
        """How it ends a command: released by decision is done, too."""
        return 0 if self.release is not None else VERDICT_EXIT_CODES[self.verdict]

    @property
    def falls_back(self) -> bool:
        """Whether the numbers rejected it, so that the next recipe may be tried. A veto never starts the ladder."""
        return self.verdict == "rejected" and self.decision is not None and not self.decision.vetoed


VERDICT_EXIT_CODES = {"accepted": 0, "rejected": 1, "unsound": 1, "inconclusive": 3}
"""How a decided release ends a command."""


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
