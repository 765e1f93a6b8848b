"""What a rule may look at, and what it may answer. Each rule is one function from Evidence to Outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from fp8pipe.config import EvalSuite, GatePolicy, PerplexityPolicy, Recipe, TaskPolicy
from fp8pipe.records import Checkpoint, EvalReport, MetricSamples, TaskResult, mean_of_samples


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a rule may look at."""

    baseline: EvalReport
    candidate: EvalReport
    policy: GatePolicy
    checkpoint: Checkpoint | None
    suite: EvalSuite | None
    recipe: Recipe | None
    look: int

    def pairs(self) -> Iterator[tuple[str, TaskResult, TaskResult]]:
        """Name and both sides of every task that the policy names and both reports hold once."""
        for name in self.policy.gated_tasks:
            ours, theirs = self.baseline.task(name), self.candidate.task(name)
            if ours is not None and theirs is not None:
                yield name, ours, theirs

    def gated_pairs(self) -> Iterator[tuple[str, TaskPolicy | PerplexityPolicy, TaskResult, TaskResult]]:
        """The same for every metric that the policy names, with what it must show."""
        both = {name: (ours, theirs) for name, ours, theirs in self.pairs()}
        for name, wanted in self.policy.gated:
            if name in both:
                yield name, wanted, *both[name]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A rule's answer."""

    outcome: Literal["passed", "vetoed", "unchecked"]
    reason: str


Rule = Callable[[Evidence], Outcome]


def passed(reason: str) -> Outcome:
    return Outcome("passed", reason)


def vetoed(reason: str) -> Outcome:
    return Outcome("vetoed", reason)


def unchecked(reason: str) -> Outcome:
    return Outcome("unchecked", reason)


def comparable(ours: MetricSamples | None, theirs: MetricSamples | None) -> bool:
    """Whether two metrics can be paired at all: present, finite, and of one length."""
    return (
        ours is not None
        and theirs is not None
        and len(ours.values) == len(theirs.values) > 0
        and all(map(math.isfinite, (*ours.values, *theirs.values)))
    )


def mean_of(metric: MetricSamples) -> float:
    """The mean that a metric's samples have."""
    return mean_of_samples(metric.metric, metric.values, metric.weights)


def settled(problems: Iterable[str], otherwise: str) -> Outcome:
    """A veto that lists every problem, or a pass."""
    found = list(problems)
    return vetoed("; ".join(found)) if found else passed(otherwise)


def same(what: str, ours: object, theirs: object) -> Outcome:
    """Both sides must name the same thing; an empty side is missing evidence."""
    if any(value in ("", (), {}, None) for value in (ours, theirs)):
        return unchecked(f"the {what} is not recorded on both sides")
    if ours != theirs:
        return vetoed(f"the {what} differs: baseline {ours}, candidate {theirs}")
    return passed(f"the {what} is the same on both sides: {ours}")


def differences(evidence: Evidence, what: str, pick: Callable[[TaskResult], object]) -> Iterator[str]:
    """One line per gated task on which the two sides differ."""
    for name, ours, theirs in evidence.pairs():
        if pick(ours) != pick(theirs):
            yield f"{name}: {what} {pick(ours)} in the baseline, {pick(theirs)} in the candidate"


def few(items: Iterable[str]) -> str:
    """The first three, for a message."""
    listed = list(items)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
