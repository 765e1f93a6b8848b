"""From rules and paired tests to one verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fp8pipe.config import EvalSuite, GatePolicy, Recipe, TaskPolicy
from fp8pipe.gate.vetoes import Evidence, apply_rules, comparable
from fp8pipe.records import Checkpoint, EvalReport, GateDecision, TaskDecision, Verdict

if TYPE_CHECKING:
    from fp8pipe.gate.statistics import Array, PairedTest


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
) -> GateDecision:
    """Whether `candidate` is non-inferior to `baseline` under `policy`.

    `checkpoint`, `suite` and `recipe` are evidence for some of the rules; without them those rules are `unchecked`.
    `attempt` of `attempts` counts the recipes of a fallback ladder, `look` the looks of the policy, both from 1; alpha
    is divided evenly over all of them (Bonferroni), so that the chance of accepting a drop of the margin stays below
    alpha over the whole ladder. A verdict with `unchecked` rules is a verdict on the numbers alone.
    """
    assert 1 <= attempt <= attempts <= policy.max_attempts, f"attempt {attempt} of {attempts}"
    assert 1 <= look <= len(policy.looks), f"look {look} of {len(policy.looks)}"
    alpha = policy.alpha / (len(policy.looks) * attempts)
    rules = apply_rules(Evidence(baseline, candidate, policy, checkpoint, suite, recipe, look))
    vetoed = tuple(rule.rule for rule in rules if rule.outcome == "vetoed")
    tasks = _compare_tasks(baseline, candidate, policy, alpha)
    verdict = _verdict(vetoed, tasks, len(policy.tasks))
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
    listed = "; ".join(f"{task.task}: {task.reason}" for task in deciding)
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
    """One decision for every task that can be paired; the rest is the rule `metrics`' to veto."""
    from fp8pipe.gate.statistics import holm_levels

    pairs = [pair for name in policy.tasks if (pair := _Pair.of(name, baseline, candidate, policy.tasks[name]))]
    tests = [pair.test() for pair in pairs]
    # Holm's family is every task of the policy, also those that could not be compared.
    p_reject = [test.p_reject for test in tests] + [1.0] * (len(policy.tasks) - len(pairs))
    levels = holm_levels(p_reject, alpha)
    return tuple(pair.decide(test, alpha, level) for pair, test, level in zip(pairs, tests, levels, strict=False))


class _Pair:
    """One metric of one task on both sides."""

    def __init__(
        self, name: str, policy: TaskPolicy, ours: Array, theirs: Array, clusters: tuple[str, ...], sign: int
    ) -> None:
        self.name, self.policy = name, policy
        self.ours, self.theirs = ours, theirs
        self.clusters, self.sign = clusters, sign

    @classmethod
    def of(cls, name: str, baseline: EvalReport, candidate: EvalReport, policy: TaskPolicy) -> _Pair | None:
        """None where there is nothing to pair sample by sample."""
        import numpy as np

        one, other = baseline.task(name), candidate.task(name)
        if one is None or other is None or one.doc_ids != other.doc_ids:
            return None
        ours, theirs = (task.samples_of(policy.metric, policy.filter) for task in (one, other))
        if ours is None or theirs is None or not comparable(ours, theirs):
            return None
        clusters = one.clusters if len(one.clusters) == len(ours.values) else ()
        sign = 1 if ours.higher_is_better else -1
        return cls(name, policy, np.asarray(ours.values), np.asarray(theirs.values), clusters, sign)

    def test(self) -> PairedTest:
        from fp8pipe.gate.statistics import paired_test

        # The sign turns lower-is-better metrics over, so that a drop is always a loss. 0/1 values stay 0/1.
        if self.sign > 0:
            return paired_test(self.ours, self.theirs, self.clusters, self.policy.margin)
        return paired_test(self.theirs, self.ours, self.clusters, self.policy.margin)

    def decide(self, test: PairedTest, alpha: float, reject_alpha: float) -> TaskDecision:
        from fp8pipe.gate.statistics import MIN_CLUSTERS, is_binary, mcnemar_p

        few = len(set(self.clusters)) if self.clusters and len(set(self.clusters)) < MIN_CLUSTERS else None
        verdict: Verdict = "inconclusive"
        if few is None and test.p_accept < alpha:
            verdict = "accepted"
        elif few is None and test.p_reject < reject_alpha:
            verdict = "rejected"
        baseline, candidate = float(self.ours.mean()), float(self.theirs.mean())
        upper, lower = test.upper(alpha), test.lower(reject_alpha)
        binary = is_binary(self.ours) and is_binary(self.theirs)
        losses = self.sign * (self.ours - self.theirs)
        lost, won = int((losses > 0).sum()), int((losses < 0).sum())
        bounds = _reason(verdict, test.drop, lower, upper, self.policy.margin, alpha, reject_alpha, self._in_points())
        return TaskDecision(
            task=self.name,
            metric=self.policy.metric,
            filter=self.policy.filter,
            verdict=verdict,
            reason=(f"{few} clusters, at least {MIN_CLUSTERS} are needed; " if few else "")
            + f"{bounds}, n={len(losses)}",
            n=len(losses),
            baseline=baseline,
            candidate=candidate,
            drop=test.drop,
            drop_lower=lower,
            drop_upper=upper,
            margin=self.policy.margin,
            method=test.method,
            p_accept=test.p_accept,
            p_reject=test.p_reject,
            discordant_lost=lost if binary else None,
            discordant_won=won if binary else None,
            mcnemar_p=mcnemar_p(lost, won) if binary else None,
            recovery=candidate / baseline if baseline else None,
        )

    def _in_points(self) -> bool:
        from fp8pipe.gate.statistics import value_range

        return value_range(self.ours, self.theirs) == 1.0


def _reason(
    verdict: Verdict,
    drop: float,
    lower: float,
    upper: float,
    margin: float,
    alpha: float,
    reject_alpha: float,
    points: bool,
) -> str:
    """`drop 0.4 points, upper bound 1.1 < margin 2.0 points at alpha 0.05`."""
    scale, unit, form = (100, " points", ".2f") if points else (1, "", ".4g")
    d, lo, up, m = (f"{scale * value:{form}}" for value in (drop, lower, upper, margin))
    if verdict == "accepted":
        return f"drop {d}{unit}, upper bound {up} < margin {m}{unit} at alpha {alpha:.3g}"
    if verdict == "rejected":
        return f"drop {d}{unit}, lower bound {lo} > margin {m}{unit} at alpha {reject_alpha:.3g}"
    return f"drop {d}{unit}, bounds {lo} to {up} around margin {m}{unit} at alpha {alpha:.3g}"
