"""The gate's power, computed exactly: with which probability a test accepts a true drop, and what that takes.

    Design             the paired score test of a 0/1 metric, over any schedule of looks
    MeanDesign         the t test of a mean, which the bootstrap of a graded metric or a perplexity approximates
    ClusterDesign      the same over sub-tasks
    acceptance         probability that the score test accepts, over every table that can be drawn at every look

Every design answers `power`, `samples_needed` and `resolvable_margin`. An undamaged quantization still changes answers:
`discordance` is the share of samples that only one side gets right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import signal, stats

from fp8pipe.config import look_sizes
from fp8pipe.gate.statistics import MIN_CLUSTERS, Array, score_statistic

_TAIL = 1e-13
"""Probability left out at each end of a count."""
_MOST = 1 << 24
"""More samples than any task has: the search for a sufficient number stops here."""


class Design:
    """The paired score test at one discordance. `alpha` is each look's; `looks` are shares of the samples."""

    def __init__(self, discordance: float, alpha: float, looks: Sequence[float] = (1.0,)) -> None:
        self.discordance, self.alpha, self.looks = discordance, alpha, tuple(looks)

    def power(self, n: int, margin: float, drop: float = 0.0) -> float:
        """Probability that a candidate whose true drop is `drop` is accepted with n samples."""
        sizes = look_sizes(n, self.looks)
        return acceptance(sizes, discordance=self.discordance, drop=drop, margin=margin, alpha=self.alpha)

    def samples_needed(self, margin: float, power: float) -> int | None:
        """Smallest n with this power, to within the few samples by which counts jump; None if there is none."""
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
        """Smallest margin with this power, to 1/100 of a point; None if there is none below 1."""
        low, high = 0, 10_000
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(n, middle / 10_000) >= power else (middle, high)
        return high / 10_000 if high < 10_000 else None


class MeanDesign(Design):
    """The t test of a mean whose samples change by `spread` (a standard deviation).

    A studentized bootstrap of many samples approximates it. Of several looks only the last is counted, which
    understates the power.
    """

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
    """The same over sub-tasks of equal size whose drops vary: `effect` times the variance of independent samples."""

    def __init__(self, spread: float, alpha: float, looks: Sequence[float], clusters: int, effect: float) -> None:
        super().__init__(spread, alpha, looks)
        self.clusters, self.effect = clusters, effect

    def power(self, n: int, margin: float, drop: float = 0.0) -> float:
        return self._power(self.clusters, self.effect * self.discordance / n, margin - drop)


def acceptance(sizes: Sequence[int], *, discordance: float, drop: float, margin: float, alpha: float) -> float:
    """Probability that the score test accepts at one of the looks.

    `sizes` are cumulative sample counts and `alpha` is each look's. Undecided tables are carried from look to look, so
    the probability is exact for any schedule.
    """
    z, before, accepted = float(stats.norm.isf(alpha)), 0, 0.0
    open_tables, lost_from, won_from = np.ones((1, 1)), 0, 0
    rates = (discordance + drop) / 2, (discordance - drop) / 2
    for n in sizes:
        step, lost_step, won_step = _tables(n - before, *rates)
        open_tables = np.clip(signal.fftconvolve(open_tables, step), 0, None)
        lost_from, won_from, before = lost_from + lost_step, won_from + won_step, n
        lost = np.arange(lost_from, lost_from + open_tables.shape[0])[:, None]
        won = np.arange(won_from, won_from + open_tables.shape[1])[None, :]
        statistic = score_statistic(lost, won, n, margin)
        accepted += float(open_tables[statistic < -z].sum())
        open_tables = np.where(np.abs(statistic) > z, 0.0, open_tables)
    return min(accepted, 1.0)


def _tables(n: int, lost_rate: float, won_rate: float) -> tuple[Array, int, int]:
    """Probabilities of (lost, won) in n samples as an array [lost, won], and the two counts at which it starts."""
    first, last = (int(stats.binom.ppf(q, n, lost_rate)) if lost_rate else 0 for q in (_TAIL, 1 - _TAIL))
    lost = np.arange(max(first, 0), last + 1)
    rest = n - lost
    share = won_rate / (1 - lost_rate) if lost_rate < 1 else 0.0
    start, end = (int(stats.binom.ppf(q, n, won_rate)) if won_rate else 0 for q in (_TAIL, 1 - _TAIL))
    won = np.arange(max(start, 0), end + 1)
    table = stats.binom.pmf(lost, n, lost_rate)[:, None] * stats.binom.pmf(won[None, :], rest[:, None], share)
    return table, int(lost[0]), int(won[0])
