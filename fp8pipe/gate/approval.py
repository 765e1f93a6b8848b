"""A person's decision to publish what the gate left inconclusive. `publishable.py` decides whether it counts."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from fp8pipe.errors import InputError, Refused
from fp8pipe.gate.publishable import policy_objection, read_policy
from fp8pipe.records import Approval, GateDecision
from fp8pipe.records.paths import record_path


def approve(folder: Path, *, who: str, reason: str) -> Approval:
    """Record in DIR/fp8pipe/approval.json that `who` releases the inconclusive result in `folder`, and why.

    The approval is of this one decision. Refused if there is nothing to approve: the verdict is not inconclusive, or
    its policy does not let people decide. InputError without a name or a reason.
    """
    for name, text in (("name", who), ("reason", reason)):
        if not text.strip():
            raise InputError(f"an approval needs a {name}; it is published with the checkpoint")
    decision = GateDecision.load(record_path(folder, "gate"))
    if decision.verdict != "inconclusive":
        raise Refused(f"{folder}: the gate {decision.verdict} it; only an inconclusive result can be approved")
    objection = policy_objection(decision, read_policy(folder))
    if objection is not None:
        raise Refused(f"{folder}: {objection}")
    when = datetime.now(UTC).isoformat(timespec="seconds")
    approval = Approval(who=who.strip(), when=when, reason=reason.strip(), decision=decision.digest())
    approval.save(record_path(folder, "approval"))
    return approval
