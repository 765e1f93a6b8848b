"""Planning the gate: chances computed exactly agree with drawing, and a suite that is too small is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from report_fixtures import policy
from scipy import stats
from typer.testing import CliRunner

from fp8pipe import config
from fp8pipe.cli import app
from fp8pipe.errors import ConfigError
from fp8pipe.gate.power import Design, look_sizes, plan_evaluation
from fp8pipe.gate.statistics import score_statistic

DOCUMENTS = {"gsm8k": 1319, "arc_easy": 2376, "arc_challenge": 1172}
"""Sizes of the test splits that shipped suites score whole."""


def drawn_acceptance(n: int, discordance: float, drop: float, margin: float, alpha: float, looks: tuple[float, ...]):
    """Share of 20,000 drawn evaluations that the score test accepts at one of the looks."""
    random, z = np.random.default_rng(11), stats.norm.isf(alpha)
    rates = [(discordance + drop) / 2, (discordance - drop) / 2, 1 - discordance]
    counts, before, verdict = np.zeros((20_000, 3)), 0, np.zeros(20_000)
    for size in look_sizes(n, looks):
        counts, before = counts + random.multinomial(size - before, rates, size=20_000), size
        statistic = score_statistic(counts[:, 0], counts[:, 1], size, margin)
        verdict = np.where(verdict == 0, np.where(np.abs(statistic) > z, np.sign(-statistic), 0), verdict)
    return float((verdict > 0).mean())


@pytest.mark.parametrize("looks", [(1.0,), (0.25, 0.5, 1.0)])
@pytest.mark.parametrize(
    ("n", "discordance", "drop"), [(250, 0.03, 0.0), (500, 0.1, 0.01), (1319, 0.06, 0.0), (4000, 0.06, 0.02)]
)
def test_power_is_the_share_that_drawing_accepts(n, discordance, drop, looks):
    planned = Design(discordance, 0.05 / len(looks), looks).power(n, 0.02, drop)
    assert drawn_acceptance(n, discordance, drop, 0.02, 0.05 / len(looks), looks) == pytest.approx(planned, abs=0.012)


def test_gsm8k_resolves_what_its_policy_says():
    assert Design(0.06, 0.05).resolvable_margin(1319, 0.8) == pytest.approx(0.017, abs=0.0005)
    assert Design(0.10, 0.05).resolvable_margin(1319, 0.8) == pytest.approx(0.022, abs=0.0005)


def test_samples_needed_is_where_the_power_is_reached():
    design = Design(0.06, 0.05)
    needed = design.samples_needed(0.02, 0.8)
    assert design.power(needed, 0.02) >= 0.8 > design.power(needed - 25, 0.02)
    assert needed == pytest.approx(6.18 * 0.06 / 0.02**2, rel=0.05)  # the normal approximation


def test_more_looks_and_attempts_need_more_samples():
    one = plan_evaluation(policy(), "unit", {"qa": 2000}).tasks[0].samples_needed
    looks = plan_evaluation(policy(looks=(0.5, 1.0)), "unit", {"qa": 2000}).tasks[0].samples_needed
    ladder = plan_evaluation(policy(max_attempts=3), "unit", {"qa": 2000}, attempts=3).tasks[0].samples_needed
    assert one < looks < ladder


@pytest.mark.parametrize("name", config.shipped("gates"))
def test_shipped_margins_are_resolvable_by_the_suite_of_the_same_name(name):
    rules, suite = config.load_policy(name), config.load_suite(name)
    samples = {task: suite.tasks[task].samples or DOCUMENTS[task] for task in rules.tasks}
    plan_evaluation(rules, suite.name, samples).require()


def test_a_suite_too_small_for_its_policy_is_an_error_that_says_what_would_do():
    plan = plan_evaluation(policy(), "unit", {"qa": 300})
    needed = plan.tasks[0].samples_needed
    with pytest.raises(
        ConfigError, match=rf"qa: 300 samples .*{needed} samples or a margin of 3\.\d\d points would do"
    ):
        plan.require()


def write(folder: Path, samples: int) -> list[str]:
    (folder / "s.yaml").write_text(f"name: s\ntasks: {{qa: {{samples: {samples}}}}}\n")
    (folder / "p.yaml").write_text("name: p\ntasks: {qa: {metric: acc, margin: 0.02}}\n")
    return ["plan-eval", "--policy", str(folder / "p.yaml"), "--suite", str(folder / "s.yaml")]


def test_the_command_tells_what_a_suite_resolves(tmp_path):
    answer = CliRunner().invoke(app, [*write(tmp_path, 2000), "--json"])
    assert answer.exit_code == 0
    (task,) = json.loads(answer.stdout)["tasks"]
    assert task["power"] > 0.95
    assert task["samples_needed"] < 2000


def test_the_command_refuses_a_suite_that_is_too_small(tmp_path):
    answer = CliRunner().invoke(app, write(tmp_path, 400))
    assert answer.exit_code == 2
    assert "80 % is asked" in answer.stdout
