"""From rules and paired tests to one verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fp8pipe.config import EvalSuite, GatePolicy, PerplexityPolicy, Recipe, TaskPolicy
from fp8pipe.gate.evidence import Evidence, comparable, mean_of
from fp8pipe.gate.vetoes import apply_rules
from fp8pipe.records import (
    Checkpoint,
    EarlierAttempt,
    EvalReport,
    GateDecision,
    MetricSamples,
    TaskDecision,
    Verdict,
    metric_label,
)

if TYPE_CHECKING:
    from fp8pipe.gate.statistics import PairedTest


def decide(
    baseline: EvalReport,
    candidate: EvalReport,
    policy: GatePolicy,
    *,
    checkpoint: Checkpoint | None = None,
    suite: EvalSuite | None = None,
    recipe: Recipe | None = None,
    attempt: int = 1,
    attempts: int = 1,
    look: int = 1,
    earlier: Sequence[EarlierAttempt] = (),
) -> GateDecision:
    """Whether `candidate` is non-inferior to `baseline` under `policy`.

    `checkpoint`, `suite` and `recipe` are evidence for some of the rules; without them those rules are `unchecked`.
    `attempt` of `attempts` counts the recipes of a fallback ladder, `look` the looks of the policy, both from 1; alpha
    is divided evenly over all of them (Bonferroni), so that the chance of accepting a drop of the margin stays below
    alpha over the whole ladder; `earlier` are the recipes that the gate rejected before. A verdict with `unchecked`
    rules is a verdict on the numbers alone.
    """
    assert 1 <= attempt <= attempts <= policy.max_attempts, f"attempt {attempt} of {attempts}"
    assert 1 <= look <= len(policy.looks), f"look {look} of {len(policy.looks)}"
    alpha = policy.alpha / (len(policy.looks) * attempts)
    rules = apply_rules(Evidence(baseline, candidate, policy, checkpoint, suite, recipe, look))
    vetoed = tuple(rule.rule for rule in rules if rule.outcome == "vetoed")
    tasks = _compare_tasks(baseline, candidate, policy, alpha)
    verdict = _verdict(vetoed, tasks, len(policy.gated))
    vetoes = [f"{rule.rule}: {rule.reason}" for rule in rules if rule.outcome == "vetoed"]
    return GateDecision(
        verdict=verdict,
        vetoed=vetoed,
        unchecked=tuple(rule.rule for rule in rules if rule.outcome == "unchecked"),
        rules=rules,
        tasks=tasks,
        policy=policy.name,
        policy_digest=policy.digest(),
        suite=candidate.suite,
        alpha=policy.alpha,
        alpha_spent=alpha,
        attempt=attempt,
        max_attempts=attempts,
        look=look,
        looks=len(policy.looks),
        earlier=tuple(earlier),
        baseline_fingerprint=baseline.fingerprint,
        candidate_fingerprint=candidate.fingerprint,
        baseline_report=_digest(baseline),
        candidate_report=_digest(candidate),
        device_class=candidate.engine.device_class,
        reason=f"vetoed: {'. '.join(vetoes)}" if vetoes else _summary(verdict, tasks),
    )


def _digest(report: EvalReport) -> str:
    try:
        return report.digest()
    except ValueError:  # a NaN has no JSON; the rule `metrics` vetoes such a report
        return "not finite"


def _verdict(vetoed: Sequence[str], tasks: Sequence[TaskDecision], expected: int) -> Verdict:
    if vetoed or any(task.verdict == "rejected" for task in tasks):
        return "rejected"
    assert len(tasks) == expected, "the rule `metrics` vetoes a task that cannot be compared"
    return "accepted" if all(task.verdict == "accepted" for task in tasks) else "inconclusive"


def _summary(verdict: Verdict, tasks: Sequence[TaskDecision]) -> str:
    deciding = [task for task in tasks if task.verdict == verdict]
    listed = "; ".join(f"{metric_label(task, tasks)}: {task.reason}" for task in deciding)
    start = {
        "accepted": "on every task the drop is shown to be below its margin",
        "rejected": "on at least one task the drop is shown to be above its margin",
        "inconclusive": "the samples do not settle whether the drop is below its margin",
    }[verdict]
    return f"{start}. {listed}"


# ---------------------------------------------------------------------------------------------- tasks


def _compare_tasks(
    baseline: EvalReport, candidate: EvalReport, policy: GatePolicy, alpha: float
) -> tuple[TaskDecision, ...]:
    """One decision for every metric that can be paired; the rest is the rule `metrics`' to veto."""
    from fp8pipe.gate.statistics import holm_levels

    pairs = [pair for name, wanted in policy.gated if (pair := _paired(name, baseline, candidate, wanted))]
    tests = [pair.test() for pair in pairs]
    # Holm's family is every metric of the policy, also those that could not be compared.
    p_reject = [test.p_reject for test in tests] + [1.0] * (len(policy.gated) - len(pairs))
    levels = holm_levels(p_reject, alpha)
    decided = zip(pairs, tests, levels, strict=False)  # more levels than pairs, where some could not be compared
    return tuple(_decide_task(pair, test, alpha, level) for pair, test, level in decided)


def _paired(
    name: str, baseline: EvalReport, candidate: EvalReport, policy: TaskPolicy | PerplexityPolicy
) -> _Scores | _Likelihoods | None:
    """One metric of one task on both sides; None where there is nothing to pair sample by sample."""
    one, other = baseline.task(name), candidate.task(name)
    if one is None or other is None or one.doc_ids != other.doc_ids:
        return None
    ours, theirs = (task.samples_of(policy.metric, policy.filter) for task in (one, other))
    if ours is None or theirs is None or not comparable(ours, theirs) or ours.weights != theirs.weights:
        return None
    if isinstance(policy, PerplexityPolicy):
        return _Likelihoods(name, policy, ours, theirs)
    return _Scores(name, policy, ours, theirs, one.clusters if len(one.clusters) == len(ours.values) else ())


class _Scores:
    """Scores whose mean counts: accuracies and graded metrics."""

    def __init__(
        self, name: str, policy: TaskPolicy, ours: MetricSamples, theirs: MetricSamples, clusters: tuple[str, ...]
    ) -> None:
        import numpy as np

        from fp8pipe.gate.statistics import is_binary, value_range

        self.name, self.policy, self.clusters = name, policy, clusters
        one, other = np.asarray(ours.values), np.asarray(theirs.values)
        self.n, self.units = len(one), len(set(clusters)) if clusters else None
        self.baseline, self.candidate = float(one.mean()), float(other.mean())
        # Where lower is better the two are turned over, so that a drop is always a loss. 0/1 values stay 0/1.
        self.better, self.worse = (one, other) if ours.higher_is_better else (other, one)
        self.binary = is_binary(one) and is_binary(other)
        self.in_points = value_range(one, other) == 1.0

    def test(self) -> PairedTest:
        from fp8pipe.gate.statistics import paired_test

        return paired_test(self.better, self.worse, self.clusters, self.policy.margin)

    def shown(self, drop: float) -> str:
        return f"{100 * drop:.2f}" if self.in_points else f"{drop:.4g}"

    @property
    def unit(self) -> str:
        return " points" if self.in_points else ""

    def reported(self) -> dict[str, Any]:
        """What stands beside the test and decides nothing."""
        from fp8pipe.gate.statistics import mcnemar_p

        beside: dict[str, Any] = {"recovery": self.candidate / self.baseline if self.baseline else None}
        if self.binary:
            losses = self.better - self.worse
            lost, won = int((losses > 0).sum()), int((losses < 0).sum())
            beside |= {"discordant_lost": lost, "discordant_won": won, "mcnemar_p": mcnemar_p(lost, won)}
        return beside


class _Likelihoods:
    """Log-likelihoods of documents; the drop is the growth of perplexity, in nats per unit."""

    def __init__(self, name: str, policy: PerplexityPolicy, ours: MetricSamples, theirs: MetricSamples) -> None:
        import numpy as np

        self.name, self.policy, self.unit = name, policy, " %"
        self.n = self.units = len(ours.values)
        self.weights = np.asarray(ours.weights or (1.0,) * self.n)
        self.ours, self.theirs = np.asarray(ours.values), np.asarray(theirs.values)
        self.baseline, self.candidate = mean_of(ours), mean_of(theirs)

    def test(self) -> PairedTest:
        from fp8pipe.gate.statistics import likelihood_test

        return likelihood_test(self.ours, self.theirs, self.weights, self.policy.margin)

    def shown(self, drop: float) -> str:
        return f"{100 * math.expm1(min(drop, 100.0)):.2f}"

    def reported(self) -> dict[str, Any]:
        """Recovery of a perplexity has no meaning."""
        return {}


def _decide_task(pair: _Scores | _Likelihoods, test: PairedTest, alpha: float, reject_alpha: float) -> TaskDecision:
    from fp8pipe.gate.statistics import MIN_CLUSTERS

    too_few = pair.units is not None and pair.units < MIN_CLUSTERS
    verdict: Verdict = "inconclusive"
    if not too_few and test.p_accept < alpha:
        verdict = "accepted"
    elif not too_few and test.p_reject < reject_alpha:
        verdict = "rejected"
    upper, lower = test.upper(alpha), test.lower(reject_alpha)
    bounds = _reason(verdict, pair, test.drop, lower, upper, alpha, reject_alpha)
    warning = f"{pair.units} clusters, at least {MIN_CLUSTERS} are needed; " if too_few else ""
    return TaskDecision(
        task=pair.name,
        metric=pair.policy.metric,
        filter=pair.policy.filter,
        verdict=verdict,
        reason=f"{warning}{bounds}, n={pair.n}",
        n=pair.n,
        baseline=pair.baseline,
        candidate=pair.candidate,
        drop=test.drop,
        drop_lower=lower,
        drop_upper=upper,
        margin=pair.policy.margin,
        method=test.method,
        p_accept=test.p_accept,
        p_reject=test.p_reject,
        **pair.reported(),
    )


def _reason(
    verdict: Verdict,
    pair: _Scores | _Likelihoods,
    drop: float,
    lower: float,
    upper: float,
    alpha: float,
    reject_alpha: float,
) -> str:
    """`drop 0.4 points, upper bound 1.1 < margin 2.0 points at alpha 0.05`."""
    unit = pair.unit
    d, lo, up, m = (pair.shown(value) for value in (drop, lower, upper, pair.policy.margin))
    if verdict == "accepted":
        return f"drop {d}{unit}, upper bound {up} < margin {m}{unit} at alpha {alpha:.3g}"
    if verdict == "rejected":
        return f"drop {d}{unit}, lower bound {lo} > margin {m}{unit} at alpha {reject_alpha:.3g}"
    return f"drop {d}{unit}, bounds {lo} to {up} around margin {m}{unit} at alpha {alpha:.3g}"
