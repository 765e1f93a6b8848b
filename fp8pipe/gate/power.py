"""What a suite can show, worked out before anything is measured: exact chances, no simulation.

    acceptance         chance that the gate accepts a true drop, over every table that can be drawn at every look
    samples_needed     smallest n that accepts an undamaged model with the power asked for
    resolvable_margin  smallest margin that n samples can show
    plan_evaluation    the three for every task of a policy: an EvalPlan

An undamaged quantization still changes answers: `discordance` is the share of samples that is right on one side only.
The score test of 0/1 metrics is what is planned with; a graded metric differs by less per sample and needs fewer, data
in clusters needs more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import signal, stats

from fp8pipe.config import GatePolicy
from fp8pipe.errors import ConfigError
from fp8pipe.gate.statistics import Array, score_statistic
from fp8pipe.records import Record

_TAIL = 1e-13
"""Probability left out at each end of a count."""


class TaskPlan(Record):
    """What one task of the policy asks, and what its samples can give."""

    task: str
    samples: int
    margin: float
    discordance: float
    """Share of samples expected to be right on one side only."""
    power: float
    """Chance that a candidate without any true drop is accepted."""
    samples_needed: int
    """For this margin with the policy's power."""
    resolvable_margin: float
    """What these samples resolve with the policy's power."""


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
    """The power that the policy asks for."""
    tasks: tuple[TaskPlan, ...]

    @property
    def unresolved(self) -> tuple[TaskPlan, ...]:
        return tuple(task for task in self.tasks if task.power < self.power)

    def require(self) -> None:
        """ConfigError when a margin is finer than its samples can resolve."""
        if not self.unresolved:
            return
        lines = [
            f"  {task.task}: {task.samples} samples accept an undamaged model in {100 * task.power:.0f} % of cases at "
            f"margin {100 * task.margin:.2f} points where {100 * task.discordance:g} % of the answers differ; "
            f"{task.samples_needed} samples or a margin of {100 * task.resolvable_margin:.2f} points would do"
            for task in self.unresolved
        ]
        raise ConfigError(
            f"policy {self.policy} asks for more than suite {self.suite} can show (power {self.power:g}, alpha "
            f"{self.alpha:g} over {len(self.looks)} look(s) and {self.attempts} attempt(s)):\n" + "\n".join(lines)
        )


def plan_evaluation(policy: GatePolicy, suite: str, samples: Mapping[str, int], *, attempts: int = 1) -> EvalPlan:
    """`samples`: documents that the suite scores per task of the policy, at its last look."""
    alpha = policy.alpha / (len(policy.looks) * attempts)
    tasks = []
    for name, wanted in policy.tasks.items():
        design = Design(wanted.discordance, alpha, policy.looks)
        tasks.append(
            TaskPlan(
                task=name,
                samples=samples[name],
                margin=wanted.margin,
                discordance=wanted.discordance,
                power=design.power(samples[name], wanted.margin),
                samples_needed=design.samples_needed(wanted.margin, policy.power),
                resolvable_margin=design.resolvable_margin(samples[name], policy.power),
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


class Design:
    """A test at one discordance: the level of each look, and the looks' shares of the samples."""

    def __init__(self, discordance: float, alpha: float, looks: Sequence[float] = (1.0,)) -> None:
        self.discordance, self.alpha, self.looks = discordance, alpha, tuple(looks)

    def power(self, n: int, margin: float, drop: float = 0.0) -> float:
        """Chance that a candidate whose true drop is `drop` is accepted with n samples."""
        sizes = look_sizes(n, self.looks)
        return acceptance(sizes, discordance=self.discordance, drop=drop, margin=margin, alpha=self.alpha)

    def samples_needed(self, margin: float, power: float) -> int:
        """Smallest n with this power, up to the steps of a few samples that counts make."""
        low, high = 1, 16
        while self.power(high, margin) < power:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(middle, margin) >= power else (middle, high)
        return high

    def resolvable_margin(self, n: int, power: float) -> float:
        """Smallest margin with this power, to 1/100 of a point; 1 where there is none below."""
        low, high = 0, 10_000
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(n, middle / 10_000) >= power else (middle, high)
        return high / 10_000


def look_sizes(n: int, looks: Sequence[float]) -> tuple[int, ...]:
    """Samples scored at each look of n in all."""
    return tuple(math.ceil(n * share) for share in looks)


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
