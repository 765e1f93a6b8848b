"""The paired tests: published values, an independent computation, and error rates computed over every table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats
from support.reports import values

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


def test_a_model_without_discordant_pairs_is_accepted_only_with_enough_samples() -> None:
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
def test_a_drop_of_the_margin_is_rejected_at_most_alpha_even_in_small_samples(n: int, discordance: float) -> None:
    assert error_rates(n, drop=0.02, discordance=discordance)[1] <= 0.05


def test_counting_the_tail_costs_a_large_sample_next_to_nothing() -> None:
    score_alone = float(stats.norm.sf(score_statistic(130, 40, 4000, 0.02)))
    assert rejection_p(130, 40, 4000, 0.02) == pytest.approx(score_alone, rel=0.05)


def test_a_model_without_a_true_drop_is_almost_never_rejected() -> None:
    assert error_rates(250, drop=0.0, discordance=0.06)[1] < 0.01


def test_mcnemar_is_the_exact_binomial_tail() -> None:
    assert mcnemar_p(8, 2) == pytest.approx(stats.binomtest(8, 10, alternative="greater").pvalue)
    assert mcnemar_p(0, 0) == 1.0


def test_mean_interval_of_an_accuracy_is_wilsons() -> None:
    low, high = mean_interval(np.array(values(90, 100)))
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)


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
