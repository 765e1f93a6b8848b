"""May this checkpoint folder be published? The one place that decides it.

    objections(folder)             every reason against it; empty if it may be published
    require_publishable(folder)    the Evidence; raises Refused with every objection
    may_publish(folder)            the same for a flow, to which a rejection is a result and not an error

The evidence is in DIR/fp8pipe/. A folder without it is not published, nor one that has changed since.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from fp8pipe.config import GatePolicy
from fp8pipe.errors import InputError, Refused
from fp8pipe.model.identity import folder_identity
from fp8pipe.records import RECORD_DIR, Approval, Checkpoint, EvalReport, GateDecision, Record, ValidationReport
from fp8pipe.records.paths import record_path

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Evidence:
    """The records of a checkpoint folder that allow, or forbid, publishing it."""

    folder: Path
    checkpoint: Checkpoint
    validation: ValidationReport
    candidate: EvalReport
    decision: GateDecision
    policy: GatePolicy | None
    approval: Approval | None

    @classmethod
    def load(cls, folder: Path) -> Evidence:
        """Read it from DIR/fp8pipe/. InputError names a record that is missing or unreadable."""
        return cls(
            folder=folder,
            checkpoint=_load(Checkpoint, folder, "checkpoint", "quantize"),
            validation=_load(ValidationReport, folder, "validation", "validate"),
            candidate=_load(EvalReport, folder, "candidate", "gate --checkpoint"),
            decision=_load(GateDecision, folder, "gate", "gate --checkpoint"),
            policy=read_policy(folder),
            approval=read_approval(folder),
        )


def read_policy(folder: Path) -> GatePolicy | None:
    """The policy in a checkpoint folder; None if there is none, or none that can be read."""
    try:
        return GatePolicy.model_validate_json(record_path(folder, "policy").read_bytes())
    except (OSError, ValidationError):
        return None


def read_approval(folder: Path) -> Approval | None:
    """The approval in a checkpoint folder, whichever decision it is of; None if there is none."""
    return Approval.load_if_present(record_path(folder, "approval"))


def _load(kind: type[R], folder: Path, name: str, stage: str) -> R:
    try:
        return kind.load(record_path(folder, name))
    except InputError as error:
        raise InputError(f"{error}; run `fp8pipe {stage}` first") from error


# ------------------------------------------------------------------------------------------ the question


def objections(folder: Path) -> tuple[str, ...]:
    """Every reason why `folder`, in its present state, may not be published; empty if it may be."""
    return _examined(folder)[1]


def require_publishable(folder: Path) -> Evidence:
    """The evidence that allows `folder`, in its present state, to be published. Raises Refused with every objection."""
    found, against = _examined(folder)
    if found is None or against:
        raise Refused(f"{folder} may not be published:\n" + "\n".join(f"  {line}" for line in against))
    return found


def may_publish(folder: Path) -> bool:
    """Answer the same question for a flow, which ends normally if the verdict forbids it or a person has to decide.

    Raises Refused if the verdict allows it but something else forbids it, such as an unchecked rule.
    """
    found, _ = _examined(folder)
    if found is not None and any(verdict_objections(found.decision, found.policy, found.approval)):
        return False
    require_publishable(folder)
    return True


def _examined(folder: Path) -> tuple[Evidence | None, tuple[str, ...]]:
    """The evidence, if it is complete, and every objection."""
    try:
        found = Evidence.load(folder)
    except InputError as error:
        return None, (str(error),)
    return found, (
        *_wrong_checkpoint(found),
        *verdict_objections(found.decision, found.policy, found.approval),
        *_unchecked(found.decision),
        *_unsound_or_changed(found),
    )


# ------------------------------------------------------------------------------------------ the objections


def verdict_objections(decision: GateDecision, policy: GatePolicy | None, approval: Approval | None) -> Iterator[str]:
    """What the verdict forbids, given the policy it was made by and a person's approval, if there is one."""
    if decision.verdict == "rejected" or decision.vetoed:
        yield f"the gate rejected it: {decision.reason}"
    elif decision.verdict == "inconclusive":
        if approval is None or approval.decision != decision.digest():
            missing = "there is no approval" if approval is None else "the approval is of another decision"
            yield f"the gate was inconclusive and {missing}: {decision.reason}; measure more samples, or approve it"
        elif (objection := policy_objection(decision, policy)) is not None:
            yield objection


def policy_objection(decision: GateDecision, policy: GatePolicy | None) -> str | None:
    """Why no person may approve an inconclusive `decision`; None if its policy lets people decide."""
    path = f"{RECORD_DIR}/policy.json"
    if policy is None:
        return f"{path} is missing or not a policy; run `fp8pipe gate --checkpoint` first"
    if policy.digest() != decision.policy_digest:
        return f"{path} is not the policy that the gate decided by; run the gate again"
    if policy.on_inconclusive != "ask":
        return f"policy {policy.name} stops at an inconclusive result; only `on_inconclusive: ask` permits approvals"
    return None


def _wrong_checkpoint(found: Evidence) -> Iterator[str]:
    judged, present = found.decision.candidate_fingerprint, found.checkpoint.fingerprint
    if judged != present:
        yield f"the gate decided on checkpoint {judged[:12]}, but this is {present[:12]}; run the gate on this one"


def _unchecked(decision: GateDecision) -> Iterator[str]:
    if decision.unchecked:
        yield f"the gate left rules unchecked: {', '.join(decision.unchecked)}; gate.json says what each lacks"


def _unsound_or_changed(found: Evidence) -> Iterator[str]:
    """What validation found, and every difference between the folder and what was validated and measured."""
    for finding in found.validation.errors:
        yield f"validation: {finding.sentence()}"
    if not found.validation.covers("values"):
        yield "only its headers were validated; run `fp8pipe validate` on the folder, which reads the values too"
    identity = folder_identity(found.folder)
    if found.validation.folder_identity != identity:
        yield "the folder changed since it was validated; validate, evaluate and gate it again"
    if found.candidate.digest() != found.decision.candidate_report:
        yield f"{RECORD_DIR}/candidate.json is not the measurement that the gate decided on; run the gate again"
    if found.candidate.folder_identity != identity:
        yield "the folder changed since it was measured; evaluate and gate it again"
