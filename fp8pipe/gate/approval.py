"""A person's decision on what the gate left inconclusive: asked for, recorded, checked before anything is published.

approve       who, when and why, for one decision, as DIR/fp8pipe/approval.json
approval_of   the record, if it is of this very decision
objection     what forbids publishing an inconclusive result; None when it is approved
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from fp8pipe.config import GatePolicy
from fp8pipe.errors import InputError, Refused
from fp8pipe.records import RECORD_DIR, Approval, GateDecision


def approve(folder: Path, *, who: str, reason: str) -> Approval:
    """Record that `who` releases the inconclusive result in `folder`, and why.

    Refused when there is nothing to approve: the verdict is another one, or its policy does not let people decide.
    """
    for name, text in (("name", who), ("reason", reason)):
        if not text.strip():
            raise InputError(f"an approval needs a {name}; it is published with the checkpoint")
    decision = GateDecision.load(folder / RECORD_DIR / "gate.json")
    if decision.verdict != "inconclusive":
        raise Refused(f"{folder}: the gate {decision.verdict} it; only an inconclusive result can be approved")
    forbidden = _policy_objection(folder, decision)
    if forbidden:
        raise Refused(f"{folder}: {forbidden}")
    when = datetime.now(UTC).isoformat(timespec="seconds")
    approval = Approval(who=who.strip(), when=when, reason=reason.strip(), decision=decision.digest())
    approval.save(folder / RECORD_DIR / "approval.json")
    return approval


def approval_of(folder: Path, decision: GateDecision) -> Approval | None:
    """The approval in `folder`, when it is of this decision and not of an earlier one."""
    found = Approval.load_if_present(folder / RECORD_DIR / "approval.json")
    return found if found is not None and found.decision == decision.digest() else None


def objection(folder: Path, decision: GateDecision) -> str | None:
    """Why an inconclusive `decision` on `folder` is not to be published."""
    if approval_of(folder, decision) is None:
        other = (folder / RECORD_DIR / "approval.json").exists()
        missing = "the approval is of another decision" if other else "there is no approval"
        return f"the gate was inconclusive and {missing}: {decision.reason}; measure more samples, or have it approved"
    return _policy_objection(folder, decision)


def _policy_objection(folder: Path, decision: GateDecision) -> str | None:
    """Whether the policy that the gate decided by lets a person decide."""
    path = folder / RECORD_DIR / "policy.json"
    try:
        policy = GatePolicy.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return f"{path} is missing or no policy; run `fp8pipe gate --checkpoint` first"
    if policy.digest() != decision.policy_digest:
        return f"{path} is not the policy that the gate decided by; run the gate again"
    if policy.on_inconclusive != "ask":
        return f"policy {policy.name} stops where the gate is inconclusive; approvals count under on_inconclusive: ask"
    return None
