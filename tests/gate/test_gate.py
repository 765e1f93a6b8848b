"""The gate: published values, error rates computed exactly, and one test for every way in which it must say no."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats
from support.reports import (
    KERNEL,
    change_engine,
    change_task,
    checkpoint,
    flipped,
    metric,
    pair,
    policy,
    recipe,
    report,
    suite,
    task,
    timed,
    values,
)

from fp8pipe.config import EvalSuite, GatePolicy, PerplexityPolicy, TaskPolicy, TaskSpec
from fp8pipe.gate import decide
from fp8pipe.gate.rules_candidate import is_w8a8
from fp8pipe.gate.statistics import (
    bootstrap_test,
    constrained_won,
    holm_levels,
    likelihood_test,
    mcnemar_p,
    mean_interval,
    paired_test,
    rejection_p,
    score_bound,
    score_statistic,
    score_test,
)
from fp8pipe.gate.vetoes import RULES
from fp8pipe.records import EvalReport, GateDecision, TaskResult

# ---------------------------------------------------------------------------------------------- score test


@pytest.mark.parametrize(
    ("lost", "won", "n", "level", "lower", "upper", "digits"),
    [
        # Fagerland, Lydersen, Laake: airway hyper-responsiveness (Bentur 2009), complete response (Cavo 2012)
        (1, 7, 21, 0.95, -0.517, -0.026, 3),
        (6, 16, 161, 0.95, -0.1240, -0.0054, 4),
        # R, PropCIs::scoreci.mp(25, 28, 618, 0.90), which estimates (28 - 25) / 618
        (28, 25, 618, 0.90, -0.0148, 0.0247, 4),
    ],
)
def test_score_interval_equals_published_values(
    lost: int, won: int, n: int, level: float, lower: float, upper: float, digits: int
) -> None:
    z = float(stats.norm.isf((1 - level) / 2))
    assert round(score_bound(lost, won, n, z), digits) == lower
    assert round(score_bound(lost, won, n, -z), digits) == upper
    assert score_test(lost, won, n, margin=0.02).upper((1 - level) / 2) == score_bound(lost, won, n, -z)


@pytest.mark.parametrize("lost, won, n", [(5, 2, 150), (0, 3, 200), (7, 0, 90), (40, 20, 160), (1, 1, 2000)])
@pytest.mark.parametrize("drop", [-0.3, -0.01, 0.005, 0.02, 0.4])
def test_score_statistic_equals_one_from_numerically_maximised_likelihood(
    lost: int, won: int, n: int, drop: float
) -> None:
    """Independent of the closed form: maximise the trinomial likelihood, then score over the root of information."""

    def negative(q: float) -> float:
        cells = np.array([q + drop, q, 1 - 2 * q - drop])
        counts = np.array([lost, won, n - lost - won])
        with np.errstate(divide="ignore", invalid="ignore"):
            return -float(np.where(counts > 0, counts * np.log(np.maximum(cells, 1e-300)), 0).sum())

    bounds = (max(0.0, -drop), (1 - drop) / 2)
    best: Any = optimize.minimize_scalar(negative, bounds=bounds, method="bounded", options={"xatol": 1e-13})
    assert constrained_won(lost, won, n, drop) == pytest.approx(best.x, abs=2e-7)
    spread = math.sqrt(n * (2 * best.x + drop - drop * drop))
    assert score_statistic(lost, won, n, drop) == pytest.approx((lost - won - n * drop) / spread, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("lost, won, n", [(0, 0, 500), (12, 3, 400), (0, 9, 400), (400, 0, 400), (1, 0, 30)])
def test_bounds_are_where_the_p_values_cross_alpha(lost: int, won: int, n: int) -> None:
    test = score_test(lost, won, n, margin=0.02)
    assert test.lower(0.05) <= test.drop <= test.upper(0.05)
    for alpha in (0.05, 0.0056):
        upper, lower = test.upper(alpha), test.lower(alpha)
        if upper < 1:
            assert score_test(lost, won, n, upper).p_accept == pytest.approx(alpha, rel=1e-4)
        if lower > -1:
            assert score_test(lost, won, n, lower).p_reject == pytest.approx(alpha, rel=1e-4)
        assert (test.p_accept < alpha) == (upper < 0.02)
        assert (test.p_reject < alpha) == (lower > 0.02)


def test_swapping_baseline_and_candidate_mirrors_the_interval() -> None:
    z = float(stats.norm.isf(0.05))
    assert score_bound(31, 12, 700, z) == pytest.approx(-score_bound(12, 31, 700, -z), abs=1e-9)
    assert score_bound(31, 12, 700, -z) == pytest.approx(-score_bound(12, 31, 700, z), abs=1e-9)


def test_no_discordant_pair_is_accepted_only_with_enough_samples() -> None:
    needed = math.ceil(stats.norm.ppf(0.95) ** 2 * 0.98 / 0.02)
    assert score_test(0, 0, needed, 0.02).p_accept < 0.05
    assert score_test(0, 0, needed - 1, 0.02).p_accept > 0.05


def every_table(n: int, drop: float, discordance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lost, won, probability) of every table that can be drawn, as flat arrays."""
    rates = [(discordance + drop) / 2, (discordance - drop) / 2, 1 - discordance]
    most = int(n * discordance + 8 * math.sqrt(n * discordance) + 8)
    lost, won = (axis.ravel() for axis in np.meshgrid(np.arange(most), np.arange(most), indexing="ij"))
    possible = lost + won <= n
    lost, won = lost[possible], won[possible]
    return lost, won, stats.multinomial.pmf(np.stack([lost, won, n - lost - won], axis=1), n, rates)


def error_rates(n: int, drop: float, discordance: float, margin: float = 0.02) -> tuple[float, float, float]:
    """Exact chances that the gate's test accepts, that it rejects, and that a Wald interval accepts, at alpha 0.05."""
    z = float(stats.norm.ppf(0.95))
    lost, won, chance = every_table(n, drop, discordance)
    statistic = score_statistic(lost, won, n, margin)
    error = np.sqrt(lost + won - (lost - won) ** 2 / n) / n
    tail = (statistic > z) & (chance > 1e-9)  # the counted tail can only take rejections away
    tail[tail] = [rejection_p(*table, n, margin) < 0.05 for table in zip(lost[tail], won[tail], strict=True)]
    wald = (lost - won) / n + z * error < margin
    return float(chance[statistic < -z].sum()), float(chance[tail].sum()), float(chance[wald].sum())


def test_a_drop_of_the_margin_is_accepted_at_most_alpha_where_wald_accepts_eleven_percent() -> None:
    accepted, _, wald = error_rates(150, drop=0.02, discordance=0.03)
    assert accepted <= 0.05
    assert 0.10 < wald < 0.13


@pytest.mark.parametrize("n", [100, 150, 250])
@pytest.mark.parametrize("discordance", [0.02, 0.03, 0.06, 0.1])
def test_a_drop_of_the_margin_is_rejected_at_most_alpha_also_in_small_samples(n: int, discordance: float) -> None:
    assert error_rates(n, drop=0.02, discordance=discordance)[1] <= 0.05


def test_counting_the_tail_costs_a_large_sample_next_to_nothing() -> None:
    score_alone = float(stats.norm.sf(score_statistic(130, 40, 4000, 0.02)))
    assert rejection_p(130, 40, 4000, 0.02) == pytest.approx(score_alone, rel=0.05)


def test_no_true_drop_is_almost_never_rejected() -> None:
    assert error_rates(250, drop=0.0, discordance=0.06)[1] < 0.01


def test_simulated_evaluations_at_the_margin_pass_the_whole_gate_at_most_alpha() -> None:
    """n=150, 3 % discordant, true drop 2 points = the margin: 400 evaluations, five standard errors of slack."""
    random, accepted, rounds = np.random.default_rng(7), 0, 400
    for _ in range(rounds):
        lost, won, _ = random.multinomial(150, [0.025, 0.005, 0.97])
        accepted += decide(*pair(150, right=120, lost=lost, won=won), policy()).verdict == "accepted"
    assert accepted / rounds <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / rounds)
    assert accepted > 0  # the test has power at all: P(accept) is 3.9 %


def test_mcnemar_is_the_exact_binomial_tail() -> None:
    assert mcnemar_p(8, 2) == pytest.approx(stats.binomtest(8, 10, alternative="greater").pvalue)
    assert mcnemar_p(0, 0) == 1.0


def test_mean_interval_is_wilsons_for_accuracies() -> None:
    low, high = mean_interval(np.array(values(90, 100)))
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)


# ---------------------------------------------------------------------------------------------- bootstrap


def test_bootstrap_bounds_agree_with_student_t_on_well_behaved_differences() -> None:
    random = np.random.default_rng(3)
    losses = random.normal(0.01, 0.1, 800)
    test = bootstrap_test(losses, (), 0.02, "bootstrap-paired")
    error = losses.std(ddof=1) / math.sqrt(800)
    assert test.drop == pytest.approx(losses.mean())
    assert test.upper(0.05) == pytest.approx(losses.mean() + 1.647 * error, abs=0.1 * error)
    assert test.lower(0.05) == pytest.approx(losses.mean() - 1.647 * error, abs=0.1 * error)
    assert test.p_accept == pytest.approx(stats.t.cdf((losses.mean() - 0.02) / error, 799), abs=0.01)


def test_bootstrap_bounds_cross_the_margin_where_the_p_values_cross_alpha() -> None:
    losses = np.random.default_rng(5).normal(0.012, 0.1, 300)
    test = bootstrap_test(losses, (), 0.02, "bootstrap-paired")
    for alpha in (0.01, 0.05, 0.2):
        upper, lower = test.upper(alpha), test.lower(alpha)
        assert bootstrap_test(losses, (), upper + 1e-6, "").p_accept <= alpha + 1e-9
        assert bootstrap_test(losses, (), upper - 1e-6, "").p_accept >= alpha
        assert bootstrap_test(losses, (), lower - 1e-6, "").p_reject <= alpha + 1e-9


def test_bootstrap_is_the_same_every_time() -> None:
    losses = np.random.default_rng(1).normal(0, 0.1, 200)
    assert bootstrap_test(losses, (), 0.02, "").p_accept == bootstrap_test(losses, (), 0.02, "").p_accept


def test_one_differing_sample_gives_the_bootstrap_no_confidence() -> None:
    losses = np.zeros(400)
    losses[0] = 0.5
    test = paired_test(np.full(400, 0.5), 0.5 - losses, (), 0.02)
    assert test.method == "bootstrap-paired"
    assert test.p_accept > 0.05
    assert test.upper(0.05) == 1.0


def test_clusters_widen_the_bounds_when_samples_of_a_cluster_fail_together() -> None:
    random = np.random.default_rng(2)
    clusters = [f"c{i // 20}" for i in range(1000)]
    failing = np.repeat(random.random(50) < 0.06, 20)
    ours, theirs = np.ones(1000), np.where(failing, 0.0, 1.0)
    alone, together = paired_test(ours, theirs, (), 0.2), paired_test(ours, theirs, clusters, 0.2)
    assert together.method == "cluster-bootstrap"
    assert together.upper(0.05) - together.drop > 2 * (alone.upper(0.05) - alone.drop)


def test_clusters_never_narrow_the_bounds() -> None:
    random = np.random.default_rng(4)
    ours = (random.random(600) < 0.8).astype(float)
    theirs = np.where(random.random(600) < 0.03, 1 - ours, ours)
    clusters = [f"c{i % 30}" for i in range(600)]
    alone, together = paired_test(ours, theirs, (), 0.02), paired_test(ours, theirs, clusters, 0.02)
    assert together.upper(0.05) >= alone.upper(0.05)
    assert together.lower(0.05) <= alone.lower(0.05)
    assert together.p_accept >= alone.p_accept


def test_holm_tests_the_smallest_first_and_stops_at_the_first_failure() -> None:
    assert holm_levels([0.04, 0.001, 0.03], 0.05) == [0.025, pytest.approx(0.05 / 3), 0.025]
    assert holm_levels([0.01, 0.02, 0.04], 0.05) == [pytest.approx(0.05 / 3), 0.025, 0.05]


# ---------------------------------------------------------------------------------------------- verdicts


def full(baseline: EvalReport, candidate: EvalReport, rules: GatePolicy | None = None, **more: Any) -> GateDecision:
    """A decision with evidence for every rule."""
    asked = suite(len(baseline.tasks[0].doc_ids) if baseline.tasks else None)
    evidence = {"checkpoint": checkpoint(), "suite": asked, "recipe": recipe()}
    return decide(baseline, candidate, rules or policy(), **(evidence | more))


def test_equal_results_are_accepted_with_every_rule_passed() -> None:
    decision = full(*pair())
    assert decision.verdict == "accepted"
    assert decision.vetoed == decision.unchecked == ()
    assert {rule.rule for rule in decision.rules} == set(RULES)
    assert decision.tasks[0].drop == 0
    assert decision.tasks[0].drop_upper == pytest.approx(stats.norm.ppf(0.95) ** 2 / (2000 + stats.norm.ppf(0.95) ** 2))


def test_a_large_drop_is_rejected_and_a_middling_one_is_inconclusive() -> None:
    assert full(*pair(lost=150, won=20)).verdict == "rejected"
    middling = full(*pair(lost=70, won=35))
    assert middling.verdict == "inconclusive"
    assert middling.tasks[0].drop_lower < 0.02 < middling.tasks[0].drop_upper


def test_the_reason_is_a_sentence_with_the_numbers_compared() -> None:
    accepted = full(*pair(lost=34, won=26)).tasks[0]
    assert accepted.reason == "drop 0.40 points, upper bound 1.06 < margin 2.00 points at alpha 0.05, n=2000"
    rejected = full(*pair(lost=150, won=20))
    assert rejected.tasks[0].reason.startswith("drop 6.50 points, lower bound 5.")
    assert "qa: drop 6.50 points" in rejected.reason


def test_a_decision_survives_its_file(tmp_path: Any) -> None:
    decision = full(*pair(lost=34, won=26))
    assert GateDecision.load(decision.save(tmp_path / "gate.json")) == decision


def test_one_bad_task_rejects_at_holms_level_and_the_others_keep_their_verdict() -> None:
    names = ("a", "b", "c")
    ours = values(900, 1000)
    theirs = {"a": ours, "b": flipped(ours, lost=60, won=5), "c": flipped(ours, lost=24, won=14)}
    baseline = report(*(task(ours, name=name) for name in names))
    candidate = report(*(task(theirs[name], name=name) for name in names), candidate=True)
    decision = full(baseline, candidate, policy(*names), suite=suite(1000, *names))
    assert [t.verdict for t in decision.tasks] == ["accepted", "rejected", "inconclusive"]
    assert decision.verdict == "rejected"
    assert "alpha 0.0167" in decision.tasks[1].reason


def test_alpha_is_divided_over_looks_and_attempts() -> None:
    rules = policy(looks=(0.5, 1.0), max_attempts=3)
    decision = full(*pair(), rules, suite=suite(2000), attempt=2, attempts=3, look=2)
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

    worse = full(report(lower(ours)), report(lower(ours + random.uniform(0.04, 0.06, 500)), candidate=True), rules)
    assert worse.verdict == "rejected"
    assert worse.tasks[0].drop == pytest.approx(0.05, abs=0.002)
    better = full(report(lower(ours)), report(lower(ours - random.uniform(0.04, 0.06, 500)), candidate=True), rules)
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
        decision = full(*sides)
        assert decision.tasks[0].p_accept < 0.05
        assert decision.verdict == verdict


# ---------------------------------------------------------------------------------------------- several metrics


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
    decision = full(*graded(), both_filters())
    assert [(t.filter, t.margin, t.verdict) for t in decision.tasks] == [
        ("strict", 0.03, "accepted"),
        ("flexible", 0.02, "accepted"),
    ]
    assert decision.verdict == "accepted"
    assert "qa exact_match,strict: drop" in decision.reason
    assert full(*graded(strict_lost=70), both_filters()).verdict == "inconclusive"
    worse = full(*graded(strict_lost=150), both_filters())
    assert (worse.verdict, [t.verdict for t in worse.tasks]) == ("rejected", ["rejected", "accepted"])
    assert "alpha 0.025" in worse.tasks[0].reason  # Holm over two metrics
    assert full(*graded(strict_lost=150), policy(tasks={"qa": both_filters().tasks["qa"][1]})).verdict == "accepted"


def test_each_metric_of_a_task_has_its_own_rules() -> None:
    assert full(*graded(failed=60), both_filters()).vetoed == ("extraction",)
    baseline, candidate = graded()
    without = change_task(candidate, metrics=candidate.tasks[0].metrics[:1])
    assert "metrics" in full(baseline, without, both_filters()).vetoed
    high = [limit.model_copy(update={"min_baseline": 0.95}) for limit in both_filters().tasks["qa"][:1]]
    chance = full(baseline, candidate, policy(tasks={"qa": [*high, *both_filters().tasks["qa"][1:]]}))
    assert chance.vetoed == ("chance",)
    assert "qa exact_match,strict: baseline 0.91" in chance.reason


# ---------------------------------------------------------------------------------------------- perplexity


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
def test_perplexity_is_held_to_its_limit_beside_the_tasks(growth: float, verdict: str) -> None:
    decision = full(*with_texts(growth), LIMIT, suite=BOTH)
    assert (decision.verdict, decision.vetoed) == (verdict, ())
    accuracy, perplexity = decision.tasks
    assert accuracy.verdict == "accepted"
    assert perplexity.drop == pytest.approx(math.log(perplexity.candidate / perplexity.baseline))
    assert "margin 1.00 %" in perplexity.reason


def test_long_documents_weigh_more_in_a_perplexity() -> None:
    words = np.array([1000.0] + [10.0] * 40)
    worse = likelihood_test(np.zeros(41), np.array([-0.1] + [0.0] * 40), words, 0.01)
    assert worse.drop == pytest.approx(0.1 * 1000 / 1400)


def test_equal_likelihoods_are_accepted_when_there_are_enough_documents() -> None:
    likelihoods = np.random.default_rng(1).normal(-2, 0.1, 400)
    test = likelihood_test(likelihoods, likelihoods, np.full(400, 100.0), 0.01)
    assert test.p_accept < 0.05
    assert test.upper(0.05) < 0.01
    assert likelihood_test(likelihoods[:30], likelihoods[:30], np.full(30, 100.0), 0.01).p_accept > 0.05


def test_fewer_than_twenty_texts_settle_nothing() -> None:
    assert full(*with_texts(0.0, documents=19), LIMIT, suite=BOTH).verdict == "inconclusive"


def test_a_perplexity_that_its_texts_do_not_have_is_vetoed() -> None:
    baseline, candidate = with_texts(0.0)
    kept = candidate.tasks[1].metrics[0]
    changed = change_task(candidate, 1, metrics=(kept.model_copy(update={"mean": kept.mean * 1.01}),))
    assert full(baseline, changed, LIMIT, suite=BOTH).vetoed == ("metrics",)
    longer = change_task(candidate, 1, metrics=(kept.model_copy(update={"weights": (1.0, *kept.weights[1:])}),))
    assert "metrics" in full(baseline, longer, LIMIT, suite=BOTH).vetoed


# ---------------------------------------------------------------------------------------------- vetoes


def vetoes(baseline: EvalReport, candidate: EvalReport, **more: Any) -> tuple[str, ...]:
    """The rules that veto; a veto must reject."""
    decision = full(baseline, candidate, **more)
    assert (decision.verdict == "rejected") == bool(decision.vetoed)
    assert GateDecision.model_validate_json(decision.model_dump_json()) == decision
    return decision.vetoed


def shortened(side: EvalReport, keep: slice) -> EvalReport:
    """The report with some samples cut out of every tuple."""
    old = side.tasks[0]
    per_sample = ("doc_ids", "doc_hashes", "prompt_hashes", "target_hashes")
    fields: dict[str, Any] = {name: getattr(old, name)[keep] for name in per_sample}
    return change_task(side, 0, **fields, metrics=(metric(old.metrics[0].values[keep]),))


def test_missing_samples_are_vetoed_on_either_side_and_on_both() -> None:
    baseline, candidate = pair()
    asked = {"suite": suite(2000)}
    assert vetoes(baseline, shortened(candidate, slice(0, 1999)), **asked) == ("samples", "completeness")
    assert vetoes(shortened(baseline, slice(0, 1999)), candidate, **asked) == ("samples", "completeness")
    both = [shortened(side, slice(0, 1999)) for side in (baseline, candidate)]
    assert vetoes(*both, **asked) == ("completeness",)


def test_fewer_samples_than_the_data_set_has_are_vetoed_where_the_suite_scores_all_of_it() -> None:
    counted = EvalSuite(name="unit", tasks={"qa": TaskSpec(documents=2000)})
    assert full(*pair(), suite=counted).vetoed == ()
    assert vetoes(*pair(1999), suite=counted) == ("completeness",)
    part = EvalSuite(name="unit", tasks={"qa": TaskSpec(documents=4000, samples=2000)})
    assert full(*pair(), suite=part).vetoed == ()


def test_extra_samples_on_both_sides_are_vetoed() -> None:
    assert vetoes(*pair(2001), suite=suite(2000)) == ("completeness",)


def test_where_nothing_tells_how_many_samples_there_are_completeness_is_unchecked() -> None:
    all_of_it = EvalSuite(name="unit", tasks={"qa": TaskSpec()})
    assert "completeness" in full(*pair(), suite=all_of_it).unchecked
    known = [change_task(side, 0, available=2000) for side in pair()]
    assert "completeness" not in full(*known, suite=all_of_it).unchecked
    part = [change_task(side, 0, available=3000) for side in pair()]
    assert vetoes(*part, suite=all_of_it) == ("completeness",)


def test_the_look_decides_how_many_samples_are_asked_for() -> None:
    rules = policy(looks=(0.25, 1.0))
    assert full(*pair(500, right=450), rules, suite=suite(2000), look=1).vetoed == ()
    assert full(*pair(500, right=450), rules, suite=suite(2000), look=2).vetoed == ("completeness",)


def test_a_sample_scored_twice_is_vetoed() -> None:
    ids = (0, 0, *range(2, 2000))
    baseline, candidate = (change_task(side, doc_ids=ids) for side in pair())
    assert vetoes(baseline, candidate) == ("samples",)


@pytest.mark.parametrize("kind", ["doc_hashes", "prompt_hashes", "target_hashes"])
def test_one_differing_hash_is_vetoed(kind: str) -> None:
    baseline, candidate = pair()
    hashes = list(getattr(candidate.tasks[0], kind))
    hashes[77] = "other"
    changed = change_task(candidate, 0, **{kind: tuple(hashes)})
    decision = full(baseline, changed)
    assert decision.vetoed == ("samples",)
    assert "documents 77" in decision.reason


def test_samples_in_another_order_are_vetoed() -> None:
    baseline, candidate = pair()
    assert "samples" in vetoes(baseline, change_task(candidate, doc_ids=tuple(reversed(range(2000)))))


def test_other_clusters_are_vetoed() -> None:
    baseline, candidate = pair()
    clustered = change_task(candidate, clusters=tuple(f"c{i % 40}" for i in range(2000)))
    assert vetoes(baseline, clustered) == ("samples",)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_is_vetoed(value: float, side: int) -> None:
    sides = list(pair())
    spoiled = (value, *sides[side].tasks[0].metrics[0].values[1:])
    sides[side] = change_task(sides[side], metrics=(metric(spoiled, mean=0.9),))
    assert "metrics" in vetoes(*sides)


def test_a_mean_that_is_not_finite_is_vetoed() -> None:
    baseline, candidate = pair()
    kept = candidate.tasks[0].metrics[0].values
    assert vetoes(baseline, change_task(candidate, metrics=(metric(kept, mean=math.nan),))) == ("metrics",)


def test_a_mean_that_its_samples_do_not_have_is_vetoed() -> None:
    baseline, candidate = pair()
    kept = candidate.tasks[0].metrics[0].values
    assert vetoes(baseline, change_task(candidate, metrics=(metric(kept, mean=0.99),))) == ("metrics",)


@pytest.mark.parametrize("side", [0, 1])
def test_a_missing_or_duplicate_metric_or_task_is_vetoed(side: int) -> None:
    def spoil(**fields: Any) -> tuple[EvalReport, EvalReport]:
        sides = list(pair())
        sides[side] = change_task(sides[side], **fields)
        return sides[0], sides[1]

    def repeat(times: int) -> tuple[EvalReport, EvalReport]:
        sides = list(pair())
        sides[side] = sides[side].model_copy(update={"tasks": sides[side].tasks * times})
        return sides[0], sides[1]

    same = pair()[side].tasks[0].metrics
    assert "metrics" in vetoes(*spoil(metrics=()))
    assert "metrics" in vetoes(*spoil(metrics=same * 2))
    assert "metrics" in vetoes(*spoil(metrics=(same[0].model_copy(update={"filter": "strict"}),)))
    assert "metrics" in vetoes(*spoil(task="other"))
    assert "metrics" in vetoes(*repeat(2))
    assert "metrics" in vetoes(*repeat(0))


def test_a_task_that_only_one_side_has_is_vetoed() -> None:
    baseline, candidate = pair()
    extra = candidate.model_copy(update={"tasks": (*candidate.tasks, task(values(5, 10), name="extra"))})
    assert vetoes(baseline, extra) == ("metrics",)


def test_fewer_values_than_documents_are_vetoed() -> None:
    baseline, candidate = pair()
    assert "metrics" in vetoes(baseline, change_task(candidate, metrics=(metric(values(1819, 1999)),)))


def test_opposite_directions_are_vetoed() -> None:
    baseline, candidate = pair()
    kept = candidate.tasks[0].metrics[0].values
    turned = change_task(candidate, metrics=(metric(kept, higher_is_better=False),))
    assert vetoes(baseline, turned) == ("metrics",)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("suite", {"suite_digest": "0" * 64}),
        ("suite", {"suite": "another"}),
        ("versions", {"versions": {"vllm": "0.31.0", "lm_eval": "0.4.13", "transformers": "5.19.0"}}),
        ("templates", {"chat_template_hash": "9" * 64}),
        ("seeds", {"seeds": {"random": 0, "fewshot": 7}}),
        ("bos", {"add_bos_token": False}),
        ("tokenizer", {"tokenizer_hash": "0" * 64}),
        ("fingerprint", {"fingerprint": "0" * 64}),
        ("fingerprint", {"role": "baseline"}),
    ],
)
def test_a_candidate_measured_differently_is_vetoed(rule: str, fields: dict[str, Any]) -> None:
    baseline, candidate = pair()
    assert vetoes(baseline, candidate.model_copy(update=fields)) == (rule,)


@pytest.mark.parametrize(("rule", "fields"), [("versions", {"version": "2.0"}), ("shots", {"num_fewshot": 5})])
def test_a_task_measured_differently_is_vetoed(rule: str, fields: dict[str, Any]) -> None:
    baseline, candidate = pair()
    assert vetoes(baseline, change_task(candidate, **fields)) == (rule,)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("context", {"max_model_len": 256}),
        ("dtype", {"dtype": "float16"}),
        ("device", {"device_class": "ada"}),
        ("kernels", {"linear_kernels": ("MarlinFP8ScaledMMLinearKernel",)}),
        ("kernels", {"linear_kernels": (KERNEL, "MarlinFP8ScaledMMLinearKernel")}),
        ("kernels", {"linear_kernels": ("CPUFp8PerTensorScaledMMLinearKernel",)}),
        ("kernels", {"quantization": None, "linear_kernels": ()}),
        ("kv_cache", {"kv_cache_dtype": "auto"}),
    ],
)
def test_a_candidate_served_differently_is_vetoed(rule: str, fields: dict[str, Any]) -> None:
    baseline, candidate = pair()
    assert vetoes(baseline, change_engine(candidate, **fields)) == (rule,)


def test_a_quantized_baseline_is_vetoed() -> None:
    baseline, candidate = pair()
    assert vetoes(change_engine(baseline, quantization="fp8"), candidate) == ("kernels",)
    assert vetoes(change_engine(baseline, kv_cache_dtype="fp8_e4m3"), candidate) == ("kv_cache",)


def test_a_baseline_of_another_model_is_vetoed() -> None:
    baseline, candidate = pair()
    assert vetoes(baseline.model_copy(update={"fingerprint": "6" * 40}), candidate) == ("fingerprint",)


def test_a_recipe_other_than_the_checkpoints_is_vetoed() -> None:
    assert vetoes(*pair(), recipe=recipe(name="fp8-static")) == ("fingerprint",)


def test_an_fp8_cache_that_the_recipe_does_not_have_is_vetoed() -> None:
    assert vetoes(*pair(), recipe=recipe(kv_cache=None)) == ("kv_cache",)


def test_a_weight_only_recipe_expects_weight_only_kernels() -> None:
    baseline, candidate = pair()
    weight_only = recipe(activations=None)
    assert vetoes(baseline, candidate, recipe=weight_only) == ("kernels",)
    marlin = change_engine(candidate, linear_kernels=("MarlinFP8ScaledMMLinearKernel",))
    assert vetoes(baseline, marlin, recipe=weight_only) == ()


@pytest.mark.parametrize(
    "kernel",
    [
        "CutlassFP8ScaledMMLinearKernel",
        "DeepGemmFp8BlockScaledMMKernel",
        "CPUFp8W8A8BlockScaledMMKernel",
        "ReferenceFp8BlockScaledMMLinearKernel",
        "ReferenceFp8Experts(fp8_w8a8)",
        "TritonExperts(fp8_w8a8)",
        KERNEL,
    ],
)
def test_w8a8_kernels_are_known_by_name(kernel: str) -> None:
    assert is_w8a8(kernel)


@pytest.mark.parametrize("kernel", ["MarlinExperts(fp8_w8a16)", "ReferenceFp8W8A16LinearKernel", "TritonExperts(None)"])
def test_other_kernels_are_not_taken_for_w8a8(kernel: str) -> None:
    assert not is_w8a8(kernel)


def test_a_device_that_the_policy_does_not_name_is_vetoed() -> None:
    baseline, candidate = (change_engine(side, device_class="cpu") for side in pair())
    assert vetoes(baseline, candidate) == ("device",)
    assert full(baseline, candidate, policy(device_classes=("cpu",))).verdict == "accepted"


def test_a_baseline_at_chance_is_vetoed() -> None:
    assert vetoes(*pair(right=600)) == ("chance",)  # 0.3, the policy's min_baseline


def test_a_checkpoint_above_the_size_limit_is_vetoed() -> None:
    assert full(*pair(), policy(max_size_ratio=0.5)).vetoed == ("size",)
    assert full(*pair(), policy(max_size_ratio=0.6)).vetoed == ()


def served(
    speed: float = 130.0, memory: int | None = 1_100_000, both: dict[str, Any] | None = None, **theirs: Any
) -> tuple[EvalReport, EvalReport]:
    """Equal results, timed: 100 tokens per second and 2,000,000 bytes in the baseline."""
    baseline, candidate = pair()
    return timed(baseline, 100.0, **(both or {})), timed(candidate, speed, memory, **(both or {}), **theirs)


LIMITS = policy(min_speedup=1.2, max_memory_ratio=0.6)


def test_limits_on_speed_and_memory_are_passed_when_they_are_met() -> None:
    decision = full(*served(speed=120.0, memory=1_200_000), LIMITS)  # exactly
    assert (decision.verdict, decision.unchecked) == ("accepted", ())
    told = {rule.rule: rule.reason for rule in decision.rules}
    assert told["speed"] == "100 -> 120 generated tokens per second, 1.200 times the baseline's, at least 1.2"
    assert told["memory"] == "2000000 -> 1200000 bytes of weights in memory, ratio 0.600, limit 0.6"


@pytest.mark.parametrize(
    ("rule", "sides", "reason"),
    [
        ("speed", served(speed=119.0), "1.190 times the baseline's is below the limit 1.2"),
        ("memory", served(memory=1_300_000), "ratio 0.650 is above the limit 0.6"),
    ],
)
def test_a_broken_limit_on_speed_or_memory_is_vetoed(
    rule: str, sides: tuple[EvalReport, EvalReport], reason: str
) -> None:
    assert vetoes(*sides, rules=LIMITS) == (rule,)
    assert reason in full(*sides, LIMITS).reason
    assert full(*sides).vetoed == ()  # a policy without limits


def test_sides_that_were_timed_on_different_workloads_are_vetoed() -> None:
    other = {"num_prompts": 64, "input_len": 8, "output_len": 128, "max_concurrency": 16, "seed": 1234}
    assert vetoes(*served(workload=other), rules=LIMITS) == ("speed", "memory")


@pytest.mark.parametrize("broken", [{"speed": 10.0, "memory": 9_000_000}, {}])
def test_figures_from_a_cpu_leave_the_limits_unchecked_whatever_they_say(broken: dict[str, Any]) -> None:
    sides = [
        change_engine(side, device_class="cpu", device_name="Some CPU")
        for side in served(**broken, both={"comparable": False})
    ]
    decision = full(*sides, policy(min_speedup=1.2, max_memory_ratio=0.6, device_classes=("cpu",)))
    assert (decision.vetoed, decision.unchecked) == ((), ("speed", "memory"))
    assert {rule.reason for rule in decision.rules if rule.outcome == "unchecked"} == {
        "taken on cpu, where figures say nothing about serving; measure both sides on a GPU"
    }


def test_limits_without_the_evidence_for_them_are_unchecked_and_say_what_to_do() -> None:
    baseline, candidate = served()
    untimed = full(baseline, candidate.model_copy(update={"serving": None}), LIMITS)
    assert untimed.unchecked == ("speed", "memory")
    assert "not timed: candidate; add `serving: {}` to the suite" in untimed.rules[-1].reason
    elsewhere = full(baseline, change_engine(candidate, device_name="NVIDIA H200"), LIMITS)
    assert elsewhere.unchecked == ("speed", "memory")
    assert full(*served(memory=None), LIMITS).unchecked == ("memory",)
    assert full(*served(speed=0.0), LIMITS).unchecked == ("speed",)


def flags(count: int) -> tuple[bool, ...]:
    return tuple(i < count for i in range(2000))


@pytest.mark.parametrize("rule", ["extraction", "truncation"])
@pytest.mark.parametrize(
    ("before", "after", "is_veto"),
    [
        (0, 60, True),  # 3 points, certain
        (0, 15, False),  # certain, but 0.75 points
        (60, 0, False),  # fewer
    ],
)
def test_more_failed_extractions_or_truncations_veto_when_certain_and_large(
    rule: str, before: int, after: int, is_veto: bool
) -> None:
    def flagged(side: EvalReport, count: int) -> EvalReport:
        if rule == "truncation":
            return change_task(side, truncated=flags(count))
        kept = side.tasks[0].metrics[0]
        return change_task(side, metrics=(kept.model_copy(update={"extraction_failed": flags(count)}),))

    baseline, candidate = pair()
    assert vetoes(flagged(baseline, before), flagged(candidate, after)) == ((rule,) if is_veto else ())
    assert vetoes(flagged(baseline, 10), candidate) == (rule,)  # recorded on one side only


def test_a_large_but_uncertain_rise_of_truncations_does_not_veto() -> None:
    before = tuple(i < 6 for i in range(200))
    after = tuple(6 <= i < 15 for i in range(200))
    baseline, candidate = pair(200, right=180)
    sides = change_task(baseline, truncated=before), change_task(candidate, truncated=after)
    assert vetoes(*sides) == ()


# ---------------------------------------------------------------------------------------------- unchecked


def test_without_checkpoint_suite_and_recipe_their_rules_are_unchecked_and_the_numbers_decide() -> None:
    decision = decide(*pair(), policy())
    assert decision.verdict == "accepted"
    assert decision.unchecked == ("completeness", "fingerprint", "kv_cache")


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("versions", {"versions": {}}),
        ("seeds", {"seeds": {}}),
        ("tokenizer", {"tokenizer_hash": ""}),
        ("suite", {"suite_digest": ""}),
    ],
)
def test_evidence_that_a_report_lacks_is_unchecked_not_passed(rule: str, fields: dict[str, Any]) -> None:
    baseline, candidate = pair()
    assert full(baseline.model_copy(update=fields), candidate).unchecked == (rule,)


def test_unrecorded_hashes_kernels_and_chance_levels_are_unchecked() -> None:
    baseline, candidate = pair()
    assert full(baseline, change_task(candidate, prompt_hashes=())).unchecked == ("samples",)
    assert full(baseline, change_engine(candidate, linear_kernels=())).unchecked == ("kernels",)
    unnamed = policy(tasks={"qa": TaskPolicy(metric="exact_match", margin=0.02)})
    assert full(baseline, candidate, unnamed).unchecked == ("chance",)


def test_baseline_against_itself_is_accepted_when_the_suite_is_long_enough() -> None:
    baseline = report(task(values(1800, 2000)))
    assert decide(baseline, baseline, policy()).verdict == "accepted"
    short = report(task(values(90, 100)))
    assert decide(short, short, policy()).verdict == "inconclusive"


def test_importing_the_gate_imports_neither_scipy_nor_prefect() -> None:
    code = "import sys, fp8pipe.gate; sys.exit(any(name in sys.modules for name in ('scipy', 'numpy', 'prefect')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
