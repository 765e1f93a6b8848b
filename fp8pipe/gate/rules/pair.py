"""What a rule sees (`Pair`), what it answers (`Ruling`), and what several rules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from fp8pipe.config import EvalSuite, GatePolicy, PerplexityPolicy, Recipe, TaskPolicy
from fp8pipe.records import Checkpoint, EvalReport, MetricSamples, TaskResult, mean_of_samples


@dataclass(frozen=True, slots=True)
class Pair:
    """Two reports, and what was asked of them."""

    baseline: EvalReport
    candidate: EvalReport
    policy: GatePolicy
    checkpoint: Checkpoint | None
    """The checkpoint that the candidate's report should be about."""
    suite: EvalSuite | None
    recipe: Recipe | None
    look: int
    """Which look of the policy this is, from 1."""

    def tasks(self) -> Iterator[tuple[str, TaskResult, TaskResult]]:
        """(name, baseline's result, candidate's result) of every gated task that each report holds exactly once."""
        for name in self.policy.gated_tasks:
            ours, theirs = self.baseline.task(name), self.candidate.task(name)
            if ours is not None and theirs is not None:
                yield name, ours, theirs

    def metrics(self) -> Iterator[tuple[str, TaskPolicy | PerplexityPolicy, TaskResult, TaskResult]]:
        """(name, the metric's policy, both results) of every gated metric of those tasks."""
        both = {name: (ours, theirs) for name, ours, theirs in self.tasks()}
        for name, wanted in self.policy.gated:
            if name in both:
                yield name, wanted, *both[name]


@dataclass(frozen=True, slots=True)
class Ruling:
    """A rule's answer, and why."""

    outcome: Literal["passed", "vetoed", "unchecked"]
    reason: str


Rule = Callable[[Pair], Ruling]


def passed(reason: str) -> Ruling:
    return Ruling("passed", reason)


def vetoed(reason: str) -> Ruling:
    return Ruling("vetoed", reason)


def unchecked(reason: str) -> Ruling:
    return Ruling("unchecked", reason)


def comparable(ours: MetricSamples | None, theirs: MetricSamples | None) -> bool:
    """Whether two metrics can be paired at all: present, finite and of one length."""
    return (
        ours is not None
        and theirs is not None
        and len(ours.values) == len(theirs.values) > 0
        and all(map(math.isfinite, (*ours.values, *theirs.values)))
    )


def mean_of(metric: MetricSamples) -> float:
    """The metric's mean, recomputed from its samples."""
    return mean_of_samples(metric.metric, metric.values, metric.weights)


def settled(problems: Iterable[str], otherwise: str) -> Ruling:
    """A veto that lists every problem, or a pass."""
    found = list(problems)
    return vetoed("; ".join(found)) if found else passed(otherwise)


def same(what: str, ours: object, theirs: object) -> Ruling:
    """Passed if the two sides are equal, vetoed if they differ, unchecked if either is empty."""
    if any(value in ("", (), {}, None) for value in (ours, theirs)):
        return unchecked(f"the {what} is not recorded on both sides")
    if ours != theirs:
        return vetoed(f"the {what} differs: baseline {ours}, candidate {theirs}")
    return passed(f"the {what} is the same on both sides: {ours}")


def differences(pair: Pair, what: str, pick: Callable[[TaskResult], object]) -> Iterator[str]:
    """One line per gated task on which the two sides differ in `what`."""
    for name, ours, theirs in pair.tasks():
        if pick(ours) != pick(theirs):
            yield f"{name}: {what} {pick(ours)} in the baseline, {pick(theirs)} in the candidate"


def few(items: Iterable[str]) -> str:
    """The first three, for a message."""
    listed = list(items)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
