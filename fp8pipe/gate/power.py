"""What a suite can show, worked out before anything is measured: exact chances, no simulation.

    acceptance         chance that the gate accepts a true drop, over every table that can be drawn at every look
    samples_needed     smallest n that accepts an undamaged model with the power asked for
    resolvable_margin  smallest margin that n samples can show
    plan_evaluation    the three for every metric of a policy: an EvalPlan

An undamaged quantization still changes answers: `discordance` is the share of samples that is right on one side only,
and 0/1 metrics are planned with the gate's own score test. A graded metric and a perplexity are planned with the t test
that their bootstrap comes to, and so are sub-tasks, whose bootstrap is the more cautious of the gate's two tests. What
is assumed of them stands in the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import signal, stats

from fp8pipe.config import GatePolicy, PerplexityPolicy, TaskPolicy, look_sizes
from fp8pipe.errors import ConfigError
from fp8pipe.gate.statistics import MIN_CLUSTERS, Array, score_statistic
from fp8pipe.records import Record

_TAIL = 1e-13
"""Probability left out at each end of a count."""
_MOST = 1 << 24
"""Samples that no task has."""
DESIGN_EFFECT = 1.5
"""Variance against that of independent samples of one weight: of sub-tasks where the policy expects no other, and of
texts, whose lengths differ."""


class TaskPlan(Record):
    """What one metric of the policy asks, and what its samples can give."""

    task: str
    metric: str
    filter: str
    samples: int
    subtasks: int | None
    """Sub-tasks that the samples come from; None where they are independent."""
    margin: float
    """As it is tested: absolute, or nats per unit of a perplexity."""
    assumes: str
    """What is expected of an undamaged model."""
    power: float
    """Chance that a candidate without any true drop is accepted."""
    samples_needed: int | None
    """For this margin with the power that each metric needs; None where no number will do."""
    resolvable_margin: float | None
    """What these samples resolve with that power; None where they resolve nothing."""

    @property
    def unit(self) -> str:
        return "%" if self.metric.endswith("perplexity") else "points"

    def shown(self, margin: float) -> str:
        """A margin as people write it: points, or percent of a perplexity."""
        return f"{100 * (math.expm1(margin) if self.unit == '%' else margin):.2f}"

    def complaint(self) -> str:
        """What the samples fall short of, and what would do."""
        start = f"{self.task} {self.metric},{self.filter}: {self.samples} samples"
        if self.resolvable_margin is None or self.samples_needed is None:
            return (
                f"{start} of {self.subtasks} sub-tasks settle nothing, at least {MIN_CLUSTERS} are needed; gate on "
                "single sub-tasks, as tasks of the suite"
            )
        return (
            f"{start} accept an undamaged model in {100 * self.power:.0f} % of cases at margin "
            f"{self.shown(self.margin)} {self.unit} where {self.assumes}; {self.samples_needed} samples or a margin of "
            f"{self.shown(self.resolvable_margin)} {self.unit} would do"
        )


class EvalPlan(Record):
    """Whether a suite can settle what a policy asks."""

    policy: str
    suite: str
    alpha: float
    alpha_spent: float
    """alpha of one look of one attempt."""
    looks: tuple[float, ...]
    attempts: int
    power: float
    """The power that the policy asks for: chance that an undamaged model is accepted on every metric."""
    tasks: tuple[TaskPlan, ...]

    @property
    def acceptance(self) -> float:
        """Chance that an undamaged model is accepted on every metric, if they are independent of each other.

        Metrics of one task rise and fall together, and then the chance is larger.
        """
        return math.prod(task.power for task in self.tasks)

    @property
    def power_each(self) -> float:
        """The power of each metric that gives the policy's to all of them together."""
        return _each(self.power, len(self.tasks))

    @property
    def unresolved(self) -> tuple[TaskPlan, ...]:
        if self.acceptance >= self.power:
            return ()
        return tuple(task for task in self.tasks if task.power < self.power_each)

    def require(self) -> None:
        """ConfigError when a margin is finer than its samples can resolve."""
        if not self.unresolved:
            return
        together = f", {self.power_each:.3f} for each of {len(self.tasks)} metrics" if len(self.tasks) > 1 else ""
        lines = [f"  {task.complaint()}" for task in self.unresolved]
        raise ConfigError(
            f"policy {self.policy} asks for more than suite {self.suite} can show (power {self.power:g}{together}, "
            f"alpha {self.alpha:g} over {len(self.looks)} look(s) and {self.attempts} attempt(s)):\n" + "\n".join(lines)
        )


def _each(power: float, metrics: int) -> float:
    return power ** (1 / metrics)


def plan_evaluation(
    policy: GatePolicy, suite: str, samples: Mapping[str, int], *, subtasks: Mapping[str, int] = {}, attempts: int = 1
) -> EvalPlan:
    """Per task of the policy `samples`, the documents that the suite scores at its last look, and their `subtasks`."""
    alpha = policy.alpha / (len(policy.looks) * attempts)
    power = _each(policy.power, len(policy.gated))
    # Several metrics must be accepted at one and the same look: only the last is counted, so that the power is at
    # least what is said.
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
    """The test that the gate will take, and in words what is expected of an undamaged model."""
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


class Design:
    """A test at one discordance: the level of each look, and the looks' shares of the samples."""

    def __init__(self, discordance: float, alpha: float, looks: Sequence[float] = (1.0,)) -> None:
        self.discordance, self.alpha, self.looks = discordance, alpha, tuple(looks)

    def power(self, n: int, margin: float, drop: float = 0.0) -> float:
        """Chance that a candidate whose true drop is `drop` is accepted with n samples."""
        sizes = look_sizes(n, self.looks)
        return acceptance(sizes, discordance=self.discordance, drop=drop, margin=margin, alpha=self.alpha)

    def samples_needed(self, margin: float, power: float) -> int | None:
        """Smallest n with this power, up to the steps of a few samples that counts make; None where none will do."""
        low, high = 1, 16
        while self.power(high, margin) < power:
            low, high = high, 2 * high
            if high > _MOST:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(middle, margin) >= power else (middle, high)
        return high

    def resolvable_margin(self, n: int, power: float) -> float | None:
        """Smallest margin with this power, to 1/100 of a point; None where there is none below 1."""
        low, high = 0, 10_000
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(n, middle / 10_000) >= power else (middle, high)
        return high / 10_000 if high < 10_000 else None


class MeanDesign(Design):
    """The t test of a mean whose samples change by `spread`, a standard deviation; what a studentized bootstrap of many
    samples comes to. Of several looks only the last is counted, so that the power is at least what is said."""

    def __init__(self, spread: float, alpha: float, looks: Sequence[float] = (1.0,)) -> None:
        super().__init__(spread**2, alpha, looks)

    def power(self, n: int, margin: float, drop: float = 0.0) -> float:
        return self._power(n, self.discordance / n, margin - drop)

    def _power(self, units: int, variance: float, distance: float) -> float:
        if units < MIN_CLUSTERS:
            return 0.0
        critical = float(stats.t.isf(self.alpha, units - 1))
        return float(stats.nct.sf(critical, units - 1, distance / math.sqrt(variance)))


class ClusterDesign(MeanDesign):
    """The same over sub-tasks of one size, whose drops scatter: `effect` times the variance of independent samples."""

    def __init__(self, spread: float, alpha: float, looks: Sequence[float], clusters: int, effect: float) -> None:
        super().__init__(spread, alpha, looks)
        self.clusters, self.effect = clusters, effect

    def power(self, n: int, margin: float, drop: float = 0.0) -> float:
        return self._power(self.clusters, self.effect * self.discordance / n, margin - drop)


def acceptance(sizes: Sequence[int], *, discordance: float, drop: float, margin: float, alpha: float) -> float:
    """Chance that the score test accepts at one of the looks; `sizes` count from the start, `alpha` is each look's.

    The tables that are still open are carried from look to look, so that the chance is exact for any schedule.
    """
    z, before, accepted = float(stats.norm.isf(alpha)), 0, 0.0
    going, lost_from, won_from = np.ones((1, 1)), 0, 0
    rates = (discordance + drop) / 2, (discordance - drop) / 2
    for n in sizes:
        step, lost_step, won_step = _tables(n - before, *rates)
        going = np.clip(signal.fftconvolve(going, step), 0, None)
        lost_from, won_from, before = lost_from + lost_step, won_from + won_step, n
        lost = np.arange(lost_from, lost_from + going.shape[0])[:, None]
        won = np.arange(won_from, won_from + going.shape[1])[None, :]
        statistic = score_statistic(lost, won, n, margin)
        accepted += float(going[statistic < -z].sum())
        going = np.where(np.abs(statistic) > z, 0.0, going)
    return min(accepted, 1.0)


def _tables(n: int, lost_rate: float, won_rate: float) -> tuple[Array, int, int]:
    """Probability of (lost, won) in n samples as [lost, won], and the counts that the array begins with."""
    first, last = (int(stats.binom.ppf(q, n, lost_rate)) if lost_rate else 0 for q in (_TAIL, 1 - _TAIL))
    lost = np.arange(max(first, 0), last + 1)
    rest = n - lost
    share = won_rate / (1 - lost_rate) if lost_rate < 1 else 0.0
    start, end = (int(stats.binom.ppf(q, n, won_rate)) if won_rate else 0 for q in (_TAIL, 1 - _TAIL))
    won = np.arange(max(start, 0), end + 1)
    table = stats.binom.pmf(lost, n, lost_rate)[:, None] * stats.binom.pmf(won[None, :], rest[:, None], share)
    return table, int(lost[0]), int(won[0])
