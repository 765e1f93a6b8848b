"""The table of checks, and what a check hands back.

In: nothing. Out: `CHECKS`, one row per id (F1 ... R1) with what it demands, how deep it must read, what it needs at
hand, what vLLM does when the demand is broken, and the remedy. Documentation is generated from this table.

A check is a small function from a Subject to Faults. It states the facts; severity, consequence and remedy come from
its row unless the fault knows better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

from fp8pipe.model.untrusted import clip
from fp8pipe.records import Finding, Severity

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

Depth = Literal["headers", "values", "fidelity"]
DEPTHS: tuple[Depth, ...] = ("headers", "values", "fidelity")
Need = Literal["config", "scheme", "source", "records", "calibration", "manifest", "vllm"]
"""What a check cannot run without: a parsed config.json, an understood quantization_config, the engine's plan, ..."""
MAX_FINDINGS_PER_CHECK = 1000
"""So that a hostile checkpoint cannot fill memory with its own faults; the rest is counted in one last finding."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One broken demand, as a check found it."""

    expected: str
    found: str
    file: str | None = None
    tensor: str | None = None
    severity: Severity | None = None
    consequence: str | None = None
    remedy: str | None = None


CheckFunction = Callable[["Subject"], Iterable[Fault]]


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table."""

    id: str
    demand: str
    """What must hold, as one sentence."""
    severity: Severity
    """Of a finding, unless the fault says otherwise."""
    depth: Depth
    needs: tuple[Need, ...]
    consequence: str
    """What vLLM does when the demand is broken."""
    remedy: str
    run: CheckFunction

    def findings(self, subject: Subject) -> Iterator[Finding]:
        """What is wrong with `subject`, at most MAX_FINDINGS_PER_CHECK and a count of the rest."""
        faults = iter(self.run(subject))
        yield from (self._finding(fault) for fault in islice(faults, MAX_FINDINGS_PER_CHECK))
        if more := sum(1 for _ in faults):
            yield self._finding(Fault(self.demand, f"{more} more findings of this check"))

    def _finding(self, fault: Fault) -> Finding:
        return Finding(
            check=self.id,
            severity=fault.severity or self.severity,
            file=None if fault.file is None else clip(fault.file),
            tensor=None if fault.tensor is None else clip(fault.tensor),
            expected=clip(fault.expected, 300),
            found=clip(fault.found, 300),
            consequence=self.consequence if fault.consequence is None else fault.consequence,
            remedy=self.remedy if fault.remedy is None else fault.remedy,
        )


CHECKS: dict[str, Check] = {}
"""All checks by id, in the order in which they run."""


def check(
    id: str,
    demand: str,
    *,
    depth: Depth = "headers",
    severity: Severity = "error",
    needs: tuple[Need, ...] = (),
    consequence: str,
    remedy: str,
) -> Callable[[CheckFunction], CheckFunction]:
    """Enter a function into the table under `id`."""

    def enter(function: CheckFunction) -> CheckFunction:
        assert id not in CHECKS, f"two checks named {id}"
        CHECKS[id] = Check(id, demand, severity, depth, needs, consequence, remedy, function)
        return function

    return enter
