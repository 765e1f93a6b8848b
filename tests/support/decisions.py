"""Decisions of the gate with everything that its rules need."""

from __future__ import annotations

from typing import Any

from fp8pipe.config import GatePolicy
from fp8pipe.gate import decide
from fp8pipe.records import EvalReport, GateDecision
from support.reports import checkpoint, policy, recipe, suite


def decide_fully(
    baseline: EvalReport, candidate: EvalReport, rules: GatePolicy | None = None, **more: Any
) -> GateDecision:
    """A decision in which no rule lacks anything; `more` replaces arguments of `decide`."""
    asked = suite(len(baseline.tasks[0].doc_ids) if baseline.tasks else None)
    known = {"checkpoint": checkpoint(), "suite": asked, "recipe": recipe()}
    return decide(baseline, candidate, rules or policy(), **(known | more))


def vetoes_of(baseline: EvalReport, candidate: EvalReport, **more: Any) -> tuple[str, ...]:
    """The rules that veto such a decision, which must reject, and must be equal after a round trip through JSON."""
    decision = decide_fully(baseline, candidate, **more)
    assert (decision.verdict == "rejected") == bool(decision.vetoed)
    assert GateDecision.model_validate_json(decision.model_dump_json()) == decision
    return decision.vetoed


def flags(count: int) -> tuple[bool, ...]:
    """One flag for each of 2,000 samples, the first `count` of them set."""
    return tuple(i < count for i in range(2000))
