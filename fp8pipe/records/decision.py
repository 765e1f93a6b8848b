"""The gate's decision, with every number that it compared, and a person's approval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fp8pipe.records.base import Record

Verdict = Literal["accepted", "rejected", "inconclusive"]


class RuleOutcome(Record):
    """The outcome of one rule of the gate, with its reason in one line."""

    rule: str
    """samples | versions | templates | seeds | shots | bos | context | tokenizer | chance | metrics | ..."""
    outcome: Literal["passed", "vetoed", "unchecked"]
    reason: str


class TaskDecision(Record):
    """The paired test of one metric of a task. drop = baseline - candidate, in the unit that is tested: 0.02 is two
    points.

    Where lower is better, drop = candidate - baseline, so that a drop is always a loss. For a perplexity it is the
    growth of the logarithm, in nats per word or byte."""

    task: str
    metric: str
    filter: str
    verdict: Verdict
    reason: str
    n: int
    baseline: float
    candidate: float
    drop: float
    drop_lower: float
    """One-sided lower bound, at the alpha of rejection."""
    drop_upper: float
    """One-sided upper bound, at the alpha of acceptance."""
    margin: float
    method: str
    """score-paired | bootstrap-paired | cluster-bootstrap | ..."""
    p_accept: float
    """p value of H0: drop >= margin."""
    p_reject: float
    """p value of H0: drop <= margin, before Holm."""
    discordant_lost: int | None = None
    """0/1 metrics: samples that the baseline got right and the candidate wrong."""
    discordant_won: int | None = None
    mcnemar_p: float | None = None
    """One-sided exact McNemar test; reported only."""
    recovery: float | None = None
    """candidate / baseline; reported only."""


def metric_label(task: TaskDecision, among: Sequence[TaskDecision]) -> str:
    """The task's name; with metric and filter where several metrics of it were tested."""
    alone = sum(other.task == task.task for other in among) == 1
    return task.task if alone else f"{task.task} {task.metric},{task.filter}"


class EarlierAttempt(Record):
    """A recipe of a fallback ladder that was tried and rejected before."""

    recipe: str
    fingerprint: str
    reason: str


class GateDecision(Record):
    """The verdict, with every number that was compared. `DIR/fp8pipe/gate.json`."""

    verdict: Verdict
    vetoed: tuple[str, ...]
    unchecked: tuple[str, ...]
    rules: tuple[RuleOutcome, ...]
    tasks: tuple[TaskDecision, ...]
    policy: str
    policy_digest: str
    suite: str
    alpha: float
    alpha_spent: float
    """alpha of this look, after alpha was split over looks and attempts."""
    attempt: int
    max_attempts: int
    look: int
    looks: int
    earlier: tuple[EarlierAttempt, ...] = ()
    """The attempts of the ladder before this one."""
    baseline_fingerprint: str
    candidate_fingerprint: str
    baseline_report: str
    """Digest of the baseline's EvalReport."""
    candidate_report: str
    device_class: str
    reason: str
    """The verdict in one sentence."""

    @property
    def final(self) -> bool:
        """Whether it is settled or was the last look, so that nothing more will be measured."""
        return self.verdict != "inconclusive" or self.look == self.looks


class Approval(Record):
    """A person's decision to publish an inconclusive result. `DIR/fp8pipe/approval.json`."""

    who: str
    when: str
    """ISO 8601, UTC."""
    reason: str
    decision: str
    """Digest of the approved GateDecision; another decision needs another approval."""
