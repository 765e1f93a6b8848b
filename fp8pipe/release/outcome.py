"""Makes the record of how a release ended: unsound, or decided by the gate, with what was published, if anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fp8pipe.config import ResolvedRelease
from fp8pipe.records import (
    Checkpoint,
    EarlierAttempt,
    GateDecision,
    Outcome,
    Release,
    Snapshot,
    ValidationReport,
    Verdict,
)

if TYPE_CHECKING:
    from fp8pipe.quantize.plan import Plan


def unsound(
    job: ResolvedRelease, snapshot: Snapshot, plan: Plan, checkpoint: Checkpoint, report: ValidationReport
) -> Outcome:
    """The release ended before any evaluation, because the validator found errors."""
    reason = f"{len(report.errors)} validation errors, the first: {report.errors[0].sentence()}"
    return _outcome(job, snapshot, plan, checkpoint, "unsound", reason)


def decided(
    job: ResolvedRelease,
    snapshot: Snapshot,
    plan: Plan,
    checkpoint: Checkpoint,
    decision: GateDecision,
    release: Release | None,
) -> Outcome:
    """The release ended at the gate or, if it was published, on the Hub."""
    return _outcome(job, snapshot, plan, checkpoint, decision.verdict, decision.reason, decision, release)


def earlier_attempts(attempts: Sequence[Outcome]) -> tuple[EarlierAttempt, ...]:
    """The attempts of a fallback ladder that ended before this one, as the next decision records them."""
    return tuple(EarlierAttempt(recipe=one.recipe, fingerprint=one.fingerprint, reason=one.reason) for one in attempts)


def released_by_decision(folder: Path, release: Release) -> Outcome | None:
    """Add the release that a person decided on to the outcome beside checkpoint folder `folder`; None without one."""
    path = folder.parent / "release.json"
    outcome = Outcome.load_if_present(path)
    if outcome is None:
        return None
    return outcome.model_copy(update={"release": release}).kept(path)


def _outcome(
    job: ResolvedRelease,
    snapshot: Snapshot,
    plan: Plan,
    checkpoint: Checkpoint,
    verdict: Verdict | Literal["unsound"],
    reason: str,
    decision: GateDecision | None = None,
    release: Release | None = None,
) -> Outcome:
    return Outcome(
        verdict=verdict,
        reason=reason,
        model_id=snapshot.model_id,
        source_commit=snapshot.commit,
        recipe=job.recipe.name,
        suite=job.suite.name,
        policy=job.policy.name,
        fingerprint=checkpoint.fingerprint,
        source_bytes=checkpoint.source_bytes,
        output_bytes=checkpoint.output_bytes,
        decision=decision,
        release=release,
        notes=plan.notes,
    )
