"""What a suite can show, worked out before anything is measured.

`plan_evaluation` says for every metric of a policy how likely an undamaged model is accepted, how many samples that
takes, and which margin the suite's samples resolve. 0/1 metrics are planned with the gate's own score test. Graded
metrics, perplexities and groups of sub-tasks are planned with the t test that their bootstrap approximates; the plan
says what it assumes of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fp8pipe.config import GatePolicy, PerplexityPolicy, TaskPolicy
from fp8pipe.errors import ConfigError
from fp8pipe.gate.power import ClusterDesign, Design, MeanDesign
from fp8pipe.gate.statistics import MIN_CLUSTERS
from fp8pipe.records import Record

DESIGN_EFFECT = 1.5
"""Variance relative to that of independent samples of one weight: of sub-tasks where the policy expects no other value,
and of texts, whose lengths differ."""


class TaskPlan(Record):
    """What one metric of the policy requires, and what its samples can show."""

    task: str
    metric: str
    filter: str
    samples: int
    subtasks: int | None
    """Sub-tasks that the samples come from; None where they are independent."""
    margin: float
    """In the unit that is tested: absolute, or nats per unit of a perplexity."""
    assumes: str
    """What is expected of an undamaged model, in words."""
    power: float
    """Probability that a candidate without any true drop is accepted."""
    samples_needed: int | None
    """For this margin, with the power that each metric needs; None if no number of samples is enough."""
    resolvable_margin: float | None
    """The smallest margin that these samples resolve with that power; None if they resolve none."""

    @property
    def unit(self) -> str:
        return "%" if self.metric.endswith("perplexity") else "points"

    def shown(self, margin: float) -> str:
        """A margin as people write it: in points, or in percent of a perplexity."""
        return f"{100 * (math.expm1(margin) if self.unit == '%' else margin):.2f}"

    def complaint(self) -> str:
        """How the samples fall short, and what would be enough."""
        start = f"{self.task} {self.metric},{self.filter}: {self.samples} samples"
        if self.resolvable_margin is None or self.samples_needed is None:
            return (
                f"{start} of {self.subtasks} sub-tasks settle nothing, at least {MIN_CLUSTERS} are needed; list "
                "single sub-tasks as tasks of the suite, and gate on those"
            )
        return (
            f"{start} accept an undamaged model in {100 * self.power:.0f} % of cases at margin "
            f"{self.shown(self.margin)} {self.unit} where {self.assumes}; {self.samples_needed} samples or a margin of "
            f"{self.shown(self.resolvable_margin)} {self.unit} would do"
        )


class EvalPlan(Record):
    """Whether a suite can settle what a policy requires."""

    policy: str
    suite: str
    alpha: float
    alpha_spent: float
    """alpha of one look of one attempt."""
    looks: tuple[float, ...]
    attempts: int
    power: float
    """The power that the policy requires: probability that an undamaged model is accepted on every metric."""
    tasks: tuple[TaskPlan, ...]

    @property
    def acceptance(self) -> float:
        """Probability that an undamaged model is accepted on every metric, if the metrics are independent.

        Metrics of one task rise and fall together, which makes the probability larger.
        """
        return math.prod(task.power for task in self.tasks)

    @property
    def power_each(self) -> float:
        """The power that each metric needs so that all of them together reach the policy's."""
        return _each(self.power, len(self.tasks))

    @property
    def unresolved(self) -> tuple[TaskPlan, ...]:
        """Metrics whose samples are too few; none if all metrics together reach the policy's power."""
        if self.acceptance >= self.power:
            return ()
        return tuple(task for task in self.tasks if task.power < self.power_each)

    def require(self) -> None:
        """Raise ConfigError if a margin is finer than its samples can resolve."""
        if not self.unresolved:
            return
        together = f", {self.power_each:.3f} for each of {len(self.tasks)} metrics" if len(self.tasks) > 1 else ""
        lines = [f"  {task.complaint()}" for task in self.unresolved]
        raise ConfigError(
            f"policy {self.policy} requires more than suite {self.suite} can show (power {self.power:g}{together}, "
            f"alpha {self.alpha:g} over {len(self.looks)} look(s) and {self.attempts} attempt(s)):\n" + "\n".join(lines)
        )


def _each(power: float, metrics: int) -> float:
    return power ** (1 / metrics)


def plan_evaluation(
    policy: GatePolicy, suite: str, samples: Mapping[str, int], *, subtasks: Mapping[str, int] = {}, attempts: int = 1
) -> EvalPlan:
    """Plan every metric of `policy` on a suite.

    `samples` and `subtasks` count, per task, the documents that the suite scores at its last look, and the sub-tasks
    that they come from.
    """
    alpha = policy.alpha / (len(policy.looks) * attempts)
    power = _each(policy.power, len(policy.gated))
    # Several metrics must all be accepted at one look. Only the last look is counted, which understates the power.
    looks = policy.looks if len(policy.gated) == 1 else (1.0,)
    tasks = []
    for name, wanted in policy.gated:
        design, assumes = _design(wanted, subtasks.get(name), alpha, looks)
        tasks.append(
            TaskPlan(
                task=name,
                metric=wanted.metric,
                filter=wanted.filter,
                samples=samples[name],
                subtasks=subtasks.get(name),
                margin=wanted.margin,
                assumes=assumes,
                power=design.power(samples[name], wanted.margin),
                samples_needed=design.samples_needed(wanted.margin, power),
                resolvable_margin=design.resolvable_margin(samples[name], power),
            )
        )
    return EvalPlan(
        policy=policy.name,
        suite=suite,
        alpha=policy.alpha,
        alpha_spent=alpha,
        looks=policy.looks,
        attempts=attempts,
        power=policy.power,
        tasks=tuple(tasks),
    )


def _design(
    wanted: TaskPolicy | PerplexityPolicy, subtasks: int | None, alpha: float, looks: Sequence[float]
) -> tuple[Design, str]:
    """The test that the gate will use, and in words what is expected of an undamaged model."""
    if isinstance(wanted, PerplexityPolicy):
        uneven = f"variance x {DESIGN_EFFECT:g} for uneven lengths"
        changes = f"a text changes by {wanted.spread:g} nats per unit (standard deviation), {uneven}"
        return MeanDesign(wanted.spread * math.sqrt(DESIGN_EFFECT), alpha, looks), changes
    if wanted.spread is not None:
        changes = f"a score changes by {wanted.spread:g} (standard deviation)"
    else:
        changes = f"{100 * wanted.discordance:g} % of the answers differ"
    spread = wanted.spread if wanted.spread is not None else math.sqrt(wanted.discordance)
    if subtasks is None:
        independent = Design(wanted.discordance, alpha, looks)
        return (independent if wanted.spread is None else MeanDesign(spread, alpha, looks)), changes
    effect = wanted.design_effect or DESIGN_EFFECT
    return ClusterDesign(spread, alpha, looks, subtasks, effect), f"{changes}, variance x {effect:g} between sub-tasks"
