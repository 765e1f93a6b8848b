"""Verdicts: how tests of several metrics, tasks, looks and attempts become one."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support.decisions import decide_fully, flags
from support.reports import change_task, flipped, metric, pair, policy, report, suite, task, values

from fp8pipe.config import EvalSuite, GatePolicy, PerplexityPolicy, TaskPolicy, TaskSpec
from fp8pipe.gate import decide
from fp8pipe.gate.rules import RULES
from fp8pipe.records import EvalReport, GateDecision, TaskResult


def test_simulated_evaluations_at_the_margin_pass_the_whole_gate_at_most_alpha() -> None:
    """n=150, 3 % discordant, true drop 2 points = the margin: 400 evaluations, five standard errors of slack."""

    @functools.cache  # many evaluations draw the same table
    def is_accepted(lost: int, won: int) -> bool:
        return decide(*pair(150, right=120, lost=lost, won=won), policy()).verdict == "accepted"

    random, accepted, rounds = np.random.default_rng(7), 0, 400
    for _ in range(rounds):
        lost, won, _ = random.multinomial(150, [0.025, 0.005, 0.97]).tolist()
        accepted += is_accepted(lost, won)
    assert accepted / rounds <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / rounds)
    assert accepted > 0  # the test has power at all: P(accept) is 3.9 %


def test_equal_results_are_accepted_with_every_rule_passed() -> None:
    decision = decide_fully(*pair())
    assert decision.verdict == "accepted"
    assert decision.vetoed == decision.unchecked == ()
    assert {rule.rule for rule in decision.rules} == set(RULES)
    assert decision.tasks[0].drop == 0
    assert decision.tasks[0].drop_upper == pytest.approx(stats.norm.ppf(0.95) ** 2 / (2000 + stats.norm.ppf(0.95) ** 2))


def test_a_large_drop_is_rejected_and_a_middling_one_is_inconclusive() -> None:
    assert decide_fully(*pair(lost=150, won=20)).verdict == "rejected"
    middling = decide_fully(*pair(lost=70, won=35))
    assert middling.verdict == "inconclusive"
    assert middling.tasks[0].drop_lower < 0.02 < middling.tasks[0].drop_upper


def test_the_reason_is_a_sentence_with_the_numbers_compared() -> None:
    accepted = decide_fully(*pair(lost=34, won=26)).tasks[0]
    assert accepted.reason == "drop 0.40 points, upper bound 1.06 < margin 2.00 points at alpha 0.05, n=2000"
    rejected = decide_fully(*pair(lost=150, won=20))
    assert rejected.tasks[0].reason.startswith("drop 6.50 points, lower bound 5.")
    assert "qa: drop 6.50 points" in rejected.reason


def test_a_decision_read_back_from_its_file_is_equal(tmp_path: Path) -> None:
    decision = decide_fully(*pair(lost=34, won=26))
    assert GateDecision.load(decision.save(tmp_path / "gate.json")) == decision


def test_one_bad_task_rejects_at_holms_level_and_the_others_keep_their_verdict() -> None:
    names = ("a", "b", "c")
    ours = values(900, 1000)
    theirs = {"a": ours, "b": flipped(ours, lost=60, won=5), "c": flipped(ours, lost=24, won=14)}
    baseline = report(*(task(ours, name=name) for name in names))
    candidate = report(*(task(theirs[name], name=name) for name in names), candidate=True)
    decision = decide_fully(baseline, candidate, policy(*names), suite=suite(1000, *names))
    assert [t.verdict for t in decision.tasks] == ["accepted", "rejected", "inconclusive"]
    assert decision.verdict == "rejected"
    assert "alpha 0.0167" in decision.tasks[1].reason


def test_alpha_is_divided_over_looks_and_attempts() -> None:
    rules = policy(looks=(0.5, 1.0), max_attempts=3)
    decision = decide_fully(*pair(), rules, suite=suite(2000), attempt=2, attempts=3, look=2)
    assert decision.alpha_spent == pytest.approx(0.05 / 6)
    assert (decision.attempt, decision.max_attempts, decision.look, decision.looks) == (2, 3, 2, 2)
    # without a difference, 2 points need 133 samples at alpha 0.05 and 281 at alpha 0.05/6
    short = pair(200, right=180)
    assert decide(*short, policy()).verdict == "accepted"
    assert decide(*short, policy(max_attempts=6), attempts=6).verdict == "inconclusive"


def test_a_metric_where_lower_is_better_counts_a_rise_as_a_drop() -> None:
    random = np.random.default_rng(8)
    ours = random.uniform(0.2, 0.4, 500)
    rules = policy(tasks={"qa": TaskPolicy(metric="exact_match", margin=0.02, min_baseline=0.9)})

    def lower(outcomes: np.ndarray) -> Any:
        return task(outcomes.tolist(), metrics=(metric(outcomes.tolist(), higher_is_better=False),))

    worse = decide_fully(
        report(lower(ours)), report(lower(ours + random.uniform(0.04, 0.06, 500)), candidate=True), rules
    )
    assert worse.verdict == "rejected"
    assert worse.tasks[0].drop == pytest.approx(0.05, abs=0.002)
    better = decide_fully(
        report(lower(ours)), report(lower(ours - random.uniform(0.04, 0.06, 500)), candidate=True), rules
    )
    assert better.verdict == "accepted"


def test_fewer_than_twenty_clusters_settle_nothing() -> None:
    ours = np.random.default_rng(6).permutation(values(1800, 2000)).tolist()
    for count, verdict in ((19, "inconclusive"), (20, "accepted")):
        clusters = tuple(f"c{i % count}" for i in range(2000))
        theirs = flipped(ours, lost=20, won=20)
        sides = (
            report(task(ours, clusters=clusters)),
            report(task(theirs, clusters=clusters), candidate=True),
        )
        decision = decide_fully(*sides)
        assert decision.tasks[0].p_accept < 0.05
        assert decision.verdict == verdict


def graded(lost: int = 0, *, strict_lost: int = 0, failed: int = 0) -> tuple[EvalReport, EvalReport]:
    """One task of 2,000 questions under two filters, of which the candidate loses so many."""
    ours = values(1820, 2000)
    kept, strict = (flipped(ours, lost=count, won=0) for count in (lost, strict_lost))
    failures = {"extraction_failed": flags(0)}, {"extraction_failed": flags(failed)}
    sides = []
    for outcomes, strictly, flag in ((ours, ours, failures[0]), (kept, strict, failures[1])):
        found = (metric(outcomes, filter="flexible"), metric(strictly, filter="strict", **flag))
        sides.append(task(outcomes, metrics=found))
    return report(sides[0]), report(sides[1], candidate=True)


def both_filters(**fields: Any) -> GatePolicy:
    limits = [
        TaskPolicy(metric="exact_match", filter="strict", margin=0.03, min_baseline=0.3),
        TaskPolicy(metric="exact_match", filter="flexible", margin=0.02, min_baseline=0.3),
    ]
    return policy(tasks={"qa": limits}, **fields)


def test_every_metric_of_a_task_must_be_accepted_at_its_own_margin() -> None:
    decision = decide_fully(*graded(), both_filters())
    assert [(t.filter, t.margin, t.verdict) for t in decision.tasks] == [
        ("strict", 0.03, "accepted"),
        ("flexible", 0.02, "accepted"),
    ]
    assert decision.verdict == "accepted"
    assert "qa exact_match,strict: drop" in decision.reason
    assert decide_fully(*graded(strict_lost=70), both_filters()).verdict == "inconclusive"
    worse = decide_fully(*graded(strict_lost=150), both_filters())
    assert (worse.verdict, [t.verdict for t in worse.tasks]) == ("rejected", ["rejected", "accepted"])
    assert "alpha 0.025" in worse.tasks[0].reason  # Holm over two metrics
    assert (
        decide_fully(*graded(strict_lost=150), policy(tasks={"qa": both_filters().tasks["qa"][1]})).verdict
        == "accepted"
    )


def test_each_metric_of_a_task_has_its_own_rules() -> None:
    assert decide_fully(*graded(failed=60), both_filters()).vetoed == ("extraction",)
    baseline, candidate = graded()
    without = change_task(candidate, metrics=candidate.tasks[0].metrics[:1])
    assert "metrics" in decide_fully(baseline, without, both_filters()).vetoed
    high = [limit.model_copy(update={"min_baseline": 0.95}) for limit in both_filters().tasks["qa"][:1]]
    chance = decide_fully(baseline, candidate, policy(tasks={"qa": [*high, *both_filters().tasks["qa"][1:]]}))
    assert chance.vetoed == ("chance",)
    assert "qa exact_match,strict: baseline 0.91" in chance.reason


def texts(growth: float, *, candidate: bool, documents: int = 60, noise: float = 0.01) -> TaskResult:
    """A rolling-likelihood task of `documents` texts, on the candidate's side `growth` nats per word less likely."""
    random = np.random.default_rng(3)
    words = tuple(random.integers(50, 500, documents).astype(float).tolist())
    likelihoods = -2.0 + 0.3 * random.standard_normal(documents)
    if candidate:
        likelihoods = likelihoods - growth - noise * random.standard_normal(documents)
    mean = math.exp(-float(np.average(likelihoods, weights=words)))
    fields = {"name": "word_perplexity", "higher_is_better": False, "weights": words, "mean": mean}
    return task(likelihoods.tolist(), name="texts", metrics=(metric(likelihoods.tolist(), **fields),))


def with_texts(growth: float, **fields: Any) -> tuple[EvalReport, EvalReport]:
    """Equal accuracies, and texts that are `growth` less likely."""
    baseline, candidate = pair()
    ours, theirs = (texts(growth, candidate=side, **fields) for side in (False, True))
    return (
        baseline.model_copy(update={"tasks": (*baseline.tasks, ours)}),
        candidate.model_copy(update={"tasks": (*candidate.tasks, theirs)}),
    )


LIMIT = policy(perplexity={"texts": PerplexityPolicy(max_increase=0.01, min_baseline=20.0)})


BOTH = EvalSuite(name="unit", tasks={"qa": TaskSpec(), "texts": TaskSpec()})


@pytest.mark.parametrize(("growth", "verdict"), [(0.0, "accepted"), (0.0095, "inconclusive"), (0.03, "rejected")])
def test_a_perplexity_is_decided_by_its_own_limit_alongside_the_tasks(growth: float, verdict: str) -> None:
    decision = decide_fully(*with_texts(growth), LIMIT, suite=BOTH)
    assert (decision.verdict, decision.vetoed) == (verdict, ())
    accuracy, perplexity = decision.tasks
    assert accuracy.verdict == "accepted"
    assert perplexity.drop == pytest.approx(math.log(perplexity.candidate / perplexity.baseline))
    assert "margin 1.00 %" in perplexity.reason


def test_fewer_than_twenty_texts_settle_nothing() -> None:
    assert decide_fully(*with_texts(0.0, documents=19), LIMIT, suite=BOTH).verdict == "inconclusive"


def test_a_perplexity_that_differs_from_that_of_its_texts_is_vetoed() -> None:
    baseline, candidate = with_texts(0.0)
    kept = candidate.tasks[1].metrics[0]
    changed = change_task(candidate, 1, metrics=(kept.model_copy(update={"mean": kept.mean * 1.01}),))
    assert decide_fully(baseline, changed, LIMIT, suite=BOTH).vetoed == ("metrics",)
    longer = change_task(candidate, 1, metrics=(kept.model_copy(update={"weights": (1.0, *kept.weights[1:])}),))
    assert "metrics" in decide_fully(baseline, longer, LIMIT, suite=BOTH).vetoed


def test_a_baseline_against_itself_is_accepted_if_the_suite_is_long_enough() -> None:
    baseline = report(task(values(1800, 2000)))
    assert decide(baseline, baseline, policy()).verdict == "accepted"
    short = report(task(values(90, 100)))
    assert decide(short, short, policy()).verdict == "inconclusive"


def test_importing_the_gate_imports_neither_scipy_nor_prefect() -> None:
    code = "import sys, fp8pipe.gate; sys.exit(any(name in sys.modules for name in ('scipy', 'numpy', 'prefect')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
