"""May this checkpoint folder be published? The one place that decides it.

    objections(folder)             every reason against it; empty if it may be published
    require_publishable(folder)    the Evidence; raises Refused with every objection
    may_publish(folder)            the same for a flow, to which a rejection is a result and not an error

The evidence is in DIR/fp8pipe/, and none of it is believed: the decision is made again from the samples of both
reports, and every file must be the one that was validated and measured. A folder without evidence is not published.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from fp8pipe.config import Config, EvalSuite, GatePolicy
from fp8pipe.errors import InputError, Refused
from fp8pipe.gate.rederived import departures
from fp8pipe.model.identity import file_hashes, identity_of, is_content, links, published_files
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import (
    PLOTS,
    RECORD_DIR,
    RECORD_FILES,
    Approval,
    Checkpoint,
    EvalReport,
    FileHash,
    GateDecision,
    Record,
    ValidationReport,
)
from fp8pipe.records.paths import record_path

C = TypeVar("C", bound=Config)
R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Evidence:
    """The records of a checkpoint folder that allow, or forbid, publishing it."""

    folder: Path
    checkpoint: Checkpoint
    plan: Plan
    validation: ValidationReport
    baseline: EvalReport
    candidate: EvalReport
    decision: GateDecision
    policy: GatePolicy | None
    suite: EvalSuite | None
    approval: Approval | None

    @classmethod
    def load(cls, folder: Path) -> Evidence:
        """Read it from DIR/fp8pipe/. InputError names a record that is missing or unreadable."""
        return cls(
            folder=folder,
            checkpoint=_load(Checkpoint, folder, "checkpoint", "quantize"),
            plan=_load(Plan, folder, "plan", "quantize"),
            validation=_load(ValidationReport, folder, "validation", "validate"),
            baseline=_load(EvalReport, folder, "baseline", "gate --checkpoint"),
            candidate=_load(EvalReport, folder, "candidate", "gate --checkpoint"),
            decision=_load(GateDecision, folder, "gate", "gate --checkpoint"),
            policy=read_policy(folder),
            suite=read_suite(folder),
            approval=read_approval(folder),
        )


def read_policy(folder: Path) -> GatePolicy | None:
    """The policy in a checkpoint folder; None if there is none, or none that can be read."""
    return _read_config(GatePolicy, folder, "policy")


def read_suite(folder: Path) -> EvalSuite | None:
    """The suite in a checkpoint folder, without its `task_dir`; None if there is none, or none that can be read."""
    return _read_config(EvalSuite, folder, "suite")


def read_approval(folder: Path) -> Approval | None:
    """The approval in a checkpoint folder, whichever decision it is of; None if there is none."""
    return Approval.load_if_present(record_path(folder, "approval"))


def _read_config(kind: type[C], folder: Path, name: str) -> C | None:
    try:
        return kind.model_validate_json(record_path(folder, name).read_bytes())
    except (OSError, ValidationError):
        return None


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
    try:
        found = Evidence.load(folder)
    except InputError as error:
        raise Refused(f"{folder} may not be published: {error}") from error
    if any(verdict_objections(found.decision, found.policy, found.approval)):
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
        *not_rederived(found),
        *unsound(found.validation),
        *(f"{name} is a link, but only plain files are published; replace it with a copy" for name in links(folder)),
        *changed(found, file_hashes(folder, published_files(folder))),
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


def not_rederived(found: Evidence) -> Iterator[str]:
    """What of the decision does not follow from the samples and the policy."""
    again = f"run `fp8pipe gate --checkpoint {found.folder}` again"
    if found.policy is None:
        yield f"{RECORD_DIR}/policy.json is missing or not a policy; {again}"
        return
    different = departures(
        found.decision,
        found.baseline,
        found.candidate,
        found.policy,
        checkpoint=found.checkpoint,
        suite=found.suite,
        recipe=found.plan.settings,
    )
    if different:
        listed = "; ".join([*different[:3], *([f"and {len(different) - 3} more"] if len(different) > 3 else [])])
        yield f"{RECORD_DIR}/gate.json is not what the reports and the policy give: {listed}; {again}"


def unsound(validation: ValidationReport) -> Iterator[str]:
    """What validation found."""
    for finding in validation.errors:
        yield f"validation: {finding.sentence()}"
    if not validation.covers("values"):
        yield "only its headers were validated; run `fp8pipe validate` on the folder, which reads the values too"


def changed(found: Evidence, files: Sequence[FileHash]) -> Iterator[str]:
    """Every difference between what was validated and measured and `files`, which are or would be published."""
    for file in files:
        if file.name.startswith(f"{RECORD_DIR}/") and not _is_record(file.name):
            yield f"{file.name} is no record of a release; remove it"
    identity = identity_of(files)
    if found.validation.folder_identity != identity:
        listed = ", ".join(_how_changed(found.validation.files, [file for file in files if is_content(file.name)]))
        yield f"the folder changed since it was validated ({listed}); validate, evaluate and gate it again"
    if found.candidate.folder_identity != identity:
        yield "the folder is not the one that was measured; evaluate and gate it again"


def _is_record(name: str) -> bool:
    place = name.removeprefix(f"{RECORD_DIR}/")
    return place in RECORD_FILES.values() or any(fnmatch(place, f"plots/{plot}.[ps][nv]g") for plot in PLOTS)


def _how_changed(before: Sequence[FileHash], now: Sequence[FileHash]) -> Iterator[str]:
    """`config.json changed`, `notes.md was added`: the first four, and how many more."""
    old, new = ({file.name: file for file in files} for files in (before, now))
    listed = [f"{name} was added" for name in new.keys() - old.keys()]
    listed += [f"{name} is gone" for name in old.keys() - new.keys()]
    listed += [f"{name} changed" for name in new.keys() & old.keys() if new[name] != old[name]]
    yield from sorted(listed)[:4]
    if len(listed) > 4:
        yield f"and {len(listed) - 4} more"
