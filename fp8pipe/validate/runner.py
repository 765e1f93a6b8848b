"""Run checks on a subject and turn their faults into findings, without those that a check which takes precedence
reports."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from fp8pipe.model.untrusted import clip
from fp8pipe.records import Finding
from fp8pipe.validate.checks.check import Check
from fp8pipe.validate.faults import MAX_FINDINGS_PER_CHECK, Fault
from fp8pipe.validate.subject import Subject


@dataclass(slots=True)
class _Found:
    """What one check found."""

    faults: list[Fault] = field(default_factory=list)
    """At most MAX_FINDINGS_PER_CHECK."""
    more: int = 0
    """How many faults are not kept."""
    names: set[str] = field(default_factory=set)
    """Names that the faults are about, if another check yields to this one."""


def run(checks: Collection[Check], subject: Subject) -> Iterator[Finding]:
    """Findings of all `checks`, in their order."""
    by_id = {check.id: check for check in checks}
    owners = {owner for check in checks for owner in check.yields_to}
    found: dict[str, _Found] = {}

    def faults_of(check: Check) -> _Found:
        if check.id not in found:
            speaking = [faults_of(by_id[owner]).names for owner in check.yields_to if owner in by_id]
            found[check.id] = _collect(check, subject, speaking, notes_names=check.id in owners)
        return found[check.id]

    for check in checks:
        result = faults_of(check)
        yield from (_finding(check, fault) for fault in result.faults)
        if result.more:
            yield _finding(check, Fault(check.demand, f"{result.more} more findings of this check"))


def _collect(check: Check, subject: Subject, speaking: list[set[str]], *, notes_names: bool) -> _Found:
    """`speaking`: names that the checks which take precedence over this one have reported."""
    found = _Found()
    for fault in check.run(subject):
        if any(name in names for names in speaking for name in fault.about):
            continue
        if notes_names:
            found.names |= fault.owned
        if len(found.faults) < MAX_FINDINGS_PER_CHECK:
            found.faults.append(fault)
        else:
            found.more += 1
    return found


def _finding(check: Check, fault: Fault) -> Finding:
    return Finding(
        check=check.id,
        severity=fault.severity or check.severity,
        file=None if fault.file is None else clip(fault.file),
        tensor=None if fault.tensor is None else clip(fault.tensor),
        expected=clip(fault.expected, 300),
        found=clip(fault.found, 300),
        consequence=check.consequence if fault.consequence is None else fault.consequence,
        remedy=check.remedy if fault.remedy is None else fault.remedy,
    )
