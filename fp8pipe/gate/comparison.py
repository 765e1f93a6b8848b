"""One metric of one task, paired sample by sample: its test, and how its numbers are shown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fp8pipe.config import PerplexityPolicy, TaskPolicy
from fp8pipe.gate.rules.pair import comparable, mean_of
from fp8pipe.records import EvalReport, MetricSamples

if TYPE_CHECKING:
    from fp8pipe.gate.statistics import PairedTest


def compare(
    name: str, baseline: EvalReport, candidate: EvalReport, policy: TaskPolicy | PerplexityPolicy
) -> ScoreComparison | LikelihoodComparison | None:
    """Pair the metric that `policy` names on task `name`; None if the two sides cannot be paired sample by sample."""
    one, other = baseline.task(name), candidate.task(name)
    if one is None or other is None or one.doc_ids != other.doc_ids:
        return None
    ours, theirs = (task.samples_of(policy.metric, policy.filter) for task in (one, other))
    if ours is None or theirs is None or not comparable(ours, theirs) or ours.weights != theirs.weights:
        return None
    if isinstance(policy, PerplexityPolicy):
        return LikelihoodComparison(name, policy, ours, theirs)
    return ScoreComparison(name, policy, ours, theirs, one.clusters if len(one.clusters) == len(ours.values) else ())


class ScoreComparison:
    """Scores whose mean is tested: accuracies and graded metrics."""

    lost: int | None = None
    """Samples right in the baseline only; None unless the metric is 0/1. `won` is the reverse."""
    won: int | None = None
    mcnemar_p: float | None = None

    def __init__(
        self, name: str, policy: TaskPolicy, ours: MetricSamples, theirs: MetricSamples, clusters: tuple[str, ...]
    ) -> None:
        import numpy as np

        from fp8pipe.gate.statistics import is_binary, mcnemar_p, paired_test, value_range

        self.name, self.policy = name, policy
        one, other = np.asarray(ours.values), np.asarray(theirs.values)
        self.n, self.clusters = len(one), len(set(clusters)) if clusters else None
        self.baseline, self.candidate = float(one.mean()), float(other.mean())
        self.recovery = self.candidate / self.baseline if self.baseline else None
        # A drop is always a loss: where lower is better, the sides change places. 0/1 values stay 0/1.
        better, worse = (one, other) if ours.higher_is_better else (other, one)
        self.in_points = value_range(one, other) == 1.0
        self.unit = " points" if self.in_points else ""
        self.test: PairedTest = paired_test(better, worse, clusters, policy.margin)
        if is_binary(one) and is_binary(other):
            self.lost, self.won = int((better > worse).sum()), int((better < worse).sum())
            self.mcnemar_p = mcnemar_p(self.lost, self.won)

    def shown(self, drop: float) -> str:
        """A drop or margin as people read it: in points if the metric is a share."""
        return f"{100 * drop:.2f}" if self.in_points else f"{drop:.4g}"


class LikelihoodComparison:
    """Log-likelihoods of documents. The drop is the growth of the perplexity's logarithm, in nats per unit."""

    unit = " %"
    lost = won = mcnemar_p = None
    recovery = None
    """The ratio of two perplexities is not a recovery."""

    def __init__(self, name: str, policy: PerplexityPolicy, ours: MetricSamples, theirs: MetricSamples) -> None:
        import numpy as np

        from fp8pipe.gate.statistics import likelihood_test

        self.name, self.policy = name, policy
        self.n = self.clusters = len(ours.values)
        self.baseline, self.candidate = mean_of(ours), mean_of(theirs)
        weights = np.asarray(ours.weights or (1.0,) * self.n)
        values = np.asarray(ours.values), np.asarray(theirs.values)
        self.test: PairedTest = likelihood_test(*values, weights, policy.margin)

    def shown(self, drop: float) -> str:
        """A drop or margin as people read it: the growth of the perplexity in percent."""
        return f"{100 * math.expm1(min(drop, 100.0)):.2f}"
