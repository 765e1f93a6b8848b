"""What a verification of a release looked at, and what it found."""

from __future__ import annotations

from typing import Literal

from fp8pipe.records.base import Record


class Proof(Record):
    """One part of a release that was looked at."""

    part: str
    """files | structure | evidence | verdict | card | provenance | tag | standing | signature"""
    outcome: Literal["proven", "broken", "open"]
    """open: nothing is wrong, and nothing is proven."""
    found: tuple[str, ...]
    """What proves it; or everything that is wrong; or what is missing for a proof."""


class Verification(Record):
    """A release, looked at by anyone, with nothing but what was published."""

    model_id: str
    """Hub id, or name of the folder."""
    commit: str | None
    """None for a folder."""
    tag: str
    """The release that the manifest names; empty without a manifest."""
    proofs: tuple[Proof, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing is broken."""
        return all(proof.outcome != "broken" for proof in self.proofs)
