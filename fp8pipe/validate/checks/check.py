"""One row of the table of checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fp8pipe.records import Depth, Severity
from fp8pipe.validate.faults import Fault, Need
from fp8pipe.validate.subject import Subject

CheckFunction = Callable[[Subject], Iterable[Fault]]


@dataclass(frozen=True, slots=True)
class Check:
    """A demand on checkpoints, and the function that finds where it is broken."""

    id: str
    demand: str
    """What must hold, as one sentence."""
    severity: Severity
    """Of a finding, unless the fault says otherwise."""
    depth: Depth
    needs: tuple[Need, ...]
    yields_to: tuple[str, ...]
    """Checks that take precedence: where one of them reports the same tensor, module, key or file, the runner drops
    this check's fault."""
    consequence: str
    """What vLLM does when the demand is broken."""
    remedy: str
    run: CheckFunction


def check(
    id: str,
    demand: str,
    *,
    depth: Depth = "headers",
    severity: Severity = "error",
    needs: tuple[Need, ...] = (),
    yields_to: tuple[str, ...] = (),
    consequence: str,
    remedy: str,
) -> Callable[[CheckFunction], Check]:
    """Make a Check of the function below."""
    return lambda run: Check(id, demand, severity, depth, needs, yields_to, consequence, remedy, run)
