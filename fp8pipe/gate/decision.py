"""From rules and paired tests to one verdict."""

from __future__ import annotations

from collections.abc import Sequence

from fp8pipe.config import EvalSuite, GatePolicy, Recipe
from fp8pipe.gate.comparison import LikelihoodComparison, ScoreComparison, compare
from fp8pipe.gate.rules import apply_rules
from fp8pipe.gate.rules.pair import Pair
from fp8pipe.records import (
    Checkpoint,
    EarlierAttempt,
    EvalReport,
    GateDecision,
    TaskDecision,
    Verdict,
    metric_label,
)


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
    """Decide whether `candidate` is non-inferior to `baseline` under `policy`.

    Some rules need `checkpoint`, `suite` or `recipe`, and are `unchecked` without them. A verdict with unchecked rules
    rests on the numbers alone. `attempt` of `attempts` counts the recipes of a fallback ladder and `look` the looks of
    the policy, both from 1. alpha is divided evenly over all of them (Bonferroni), so that the whole ladder accepts a
    drop of the margin with a probability of about alpha at most. `earlier` are the recipes that the gate has already
    rejected."""
    assert 1 <= attempt <= attempts <= policy.max_attempts, f"attempt {attempt} of {attempts}"
    assert 1 <= look <= len(policy.looks), f"look {look} of {len(policy.looks)}"
    alpha = policy.alpha / (len(policy.looks) * attempts)
    rulings = apply_rules(Pair(baseline, candidate, policy, checkpoint, suite, recipe, look))
    vetoes = [ruling for ruling in rulings if ruling.outcome == "vetoed"]
    tasks = _compare_tasks(baseline, candidate, policy, alpha)
    verdict = _verdict(bool(vetoes), tasks, len(policy.gated))
    vetoed_because = ". ".join(f"{ruling.rule}: {ruling.reason}" for ruling in vetoes)
    return GateDecision(
        verdict=verdict,
        vetoed=tuple(ruling.rule for ruling in vetoes),
        unchecked=tuple(ruling.rule for ruling in rulings if ruling.outcome == "unchecked"),
        rules=rulings,
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
        reason=f"vetoed: {vetoed_because}" if vetoes else _summary(verdict, tasks),
    )


def _digest(report: EvalReport) -> str:
    try:
        return report.digest()
    except ValueError:  # JSON has no NaN; the rule `metrics` vetoes such a report
        return "not finite"


def _verdict(vetoed: bool, tasks: Sequence[TaskDecision], expected: int) -> Verdict:
    if vetoed or any(task.verdict == "rejected" for task in tasks):
        return "rejected"
    assert len(tasks) == expected, "the rule `metrics` vetoes a metric that cannot be compared"
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


def _compare_tasks(
    baseline: EvalReport, candidate: EvalReport, policy: GatePolicy, alpha: float
) -> tuple[TaskDecision, ...]:
    """One decision per metric that can be paired. The rule `metrics` vetoes the others."""
    from fp8pipe.gate.statistics import holm_levels

    found = (compare(name, baseline, candidate, wanted) for name, wanted in policy.gated)
    comparisons = [comparison for comparison in found if comparison is not None]
    # Holm's family is every metric of the policy, including those that could not be compared.
    missing = len(policy.gated) - len(comparisons)
    levels = holm_levels([comparison.test.p_reject for comparison in comparisons] + [1.0] * missing, alpha)
    return tuple(_decide_task(one, alpha, level) for one, level in zip(comparisons, levels, strict=False))


def _decide_task(comparison: ScoreComparison | LikelihoodComparison, alpha: float, reject_alpha: float) -> TaskDecision:
    from fp8pipe.gate.statistics import MIN_CLUSTERS

    test, wanted = comparison.test, comparison.policy
    too_few = comparison.clusters is not None and comparison.clusters < MIN_CLUSTERS
    verdict: Verdict = "inconclusive"
    if not too_few and test.p_accept < alpha:
        verdict = "accepted"
    elif not too_few and test.p_reject < reject_alpha:
        verdict = "rejected"
    lower, upper = test.lower(reject_alpha), test.upper(alpha)
    warning = f"{comparison.clusters} clusters, at least {MIN_CLUSTERS} are needed; " if too_few else ""
    bounds = _reason(verdict, comparison, lower, upper, alpha, reject_alpha)
    return TaskDecision(
        task=comparison.name,
        metric=wanted.metric,
        filter=wanted.filter,
        verdict=verdict,
        reason=f"{warning}{bounds}, n={comparison.n}",
        n=comparison.n,
        baseline=comparison.baseline,
        candidate=comparison.candidate,
        drop=test.drop,
        drop_lower=lower,
        drop_upper=upper,
        margin=wanted.margin,
        method=test.method,
        p_accept=test.p_accept,
        p_reject=test.p_reject,
        discordant_lost=comparison.lost,
        discordant_won=comparison.won,
        mcnemar_p=comparison.mcnemar_p,
        recovery=comparison.recovery,
    )


def _reason(
    verdict: Verdict,
    comparison: ScoreComparison | LikelihoodComparison,
    lower: float,
    upper: float,
    alpha: float,
    reject_alpha: float,
) -> str:
    """`drop 0.40 points, upper bound 1.06 < margin 2.00 points at alpha 0.05`."""
    unit, numbers = comparison.unit, (comparison.test.drop, lower, upper, comparison.policy.margin)
    drop, low, high, margin = (comparison.shown(value) for value in numbers)
    if verdict == "accepted":
        return f"drop {drop}{unit}, upper bound {high} < margin {margin}{unit} at alpha {alpha:.3g}"
    if verdict == "rejected":
        return f"drop {drop}{unit}, lower bound {low} > margin {margin}{unit} at alpha {reject_alpha:.3g}"
    return f"drop {drop}{unit}, bounds {low} to {high} around margin {margin}{unit} at alpha {alpha:.3g}"
