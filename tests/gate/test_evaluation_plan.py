"""Planning the gate: computed probabilities agree with simulation, and a suite that is too small is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support.reports import policy
from typer.testing import CliRunner

from benchmarks import policies
from benchmarks.page import put
from fp8pipe import config, stages
from fp8pipe.cli import app
from fp8pipe.config import PerplexityPolicy, TaskPolicy, look_sizes
from fp8pipe.errors import ConfigError
from fp8pipe.gate.evaluation_plan import plan_evaluation
from fp8pipe.gate.power import ClusterDesign, Design, MeanDesign
from fp8pipe.gate.statistics import paired_test, ratio_bootstrap, score_statistic


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
def test_power_is_the_share_of_simulated_evaluations_that_is_accepted(n, discordance, drop, looks):
    planned = Design(discordance, 0.05 / len(looks), looks).power(n, 0.02, drop)
    assert drawn_acceptance(n, discordance, drop, 0.02, 0.05 / len(looks), looks) == pytest.approx(planned, abs=0.012)


def test_gsm8k_resolves_the_margins_that_its_policy_states():
    assert Design(0.06, 0.05).resolvable_margin(1319, 0.8) == pytest.approx(0.017, abs=0.0005)
    assert Design(0.10, 0.05).resolvable_margin(1319, 0.8) == pytest.approx(0.022, abs=0.0005)


def test_samples_needed_is_the_size_at_which_the_power_is_reached():
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
def test_shipped_margins_are_resolvable_by_the_suite_of_the_same_name(name, tmp_path):
    rules, suite = config.load_policy(name), config.load_suite(name)
    config.check_fit(rules, suite)
    plan = stages.plan_evaluation(rules, suite, tmp_path)
    plan.require()
    assert plan.acceptance >= rules.power
    assert [(task.task, task.metric) for task in plan.tasks] == [(name, limit.metric) for name, limit in rules.gated]
    assert not list(tmp_path.iterdir())  # nothing was looked up in the data


def test_every_shipped_suite_has_a_policy_of_its_name():
    assert config.shipped("gates") == config.shipped("suites")


@pytest.mark.parametrize(
    ("page", "title", "text"),
    [("gate.md", policies.GATE, policies.policies), ("evaluation.md", policies.EVALUATION, policies.documents)],
)
def test_tables_of_policies_in_docs_are_what_the_command_writes(page, title, text, tmp_path):
    written = (policies.DOCS / page).read_text()
    copy = tmp_path / page
    copy.write_text(written)
    put(copy, title, text())
    assert copy.read_text() == written, "run `python -m benchmarks.policies`"


# ---------------------------------------------------------------------------------------------- several metrics


def limits(**fields: object) -> TaskPolicy:
    return TaskPolicy.model_validate({"metric": "acc", "margin": 0.02, "min_baseline": 0.3} | fields)


def test_all_metrics_together_must_reach_the_power_that_the_policy_asks_for():
    n = Design(0.06, 0.05).samples_needed(0.02, 0.8)
    assert plan_evaluation(policy("a"), "unit", {"a": n}).unresolved == ()
    three = plan_evaluation(policy("a", "b", "c"), "unit", dict.fromkeys("abc", n))
    assert three.acceptance == pytest.approx(0.8**3, abs=0.01)
    assert [task.task for task in three.unresolved] == ["a", "b", "c"]
    with pytest.raises(ConfigError, match=r"0\.928 for each of 3 metrics"):
        three.require()
    enough = dict.fromkeys("abc", three.tasks[0].samples_needed)
    plan_evaluation(policy("a", "b", "c"), "unit", enough).require()


def test_one_metric_may_fall_short_if_the_others_have_power_to_spare():
    n = Design(0.06, 0.05).samples_needed(0.02, 0.85)
    plan = plan_evaluation(policy("a", "b"), "unit", {"a": n, "b": 4 * n})
    assert plan.tasks[0].power < plan.power_each
    plan.require()


def test_every_metric_of_a_task_is_planned():
    both = [limits(filter="strict", margin=0.03), limits(filter="loose")]
    plan = plan_evaluation(policy(tasks={"qa": both}), "unit", {"qa": 2000})
    assert [(task.filter, task.margin) for task in plan.tasks] == [("strict", 0.03), ("loose", 0.02)]
    assert plan.acceptance == pytest.approx(plan.tasks[0].power * plan.tasks[1].power)


# ---------------------------------------------------------------------------------------------- other metrics

# fmt: off
MMLU = (
    100, 135, 152, 100, 265, 144, 100, 100, 100, 173, 102, 100, 235, 114, 145, 378, 126, 100, 310, 203, 100, 165,
    198, 193, 390, 270, 238, 151, 545, 216, 204, 237, 223, 131, 121, 108, 163, 112, 103, 234, 100, 783, 346, 895,
    306, 311, 324, 282, 1534, 272, 612, 110, 245, 201, 100, 166, 171,
)
# fmt: on
"""Questions per subject of mmlu."""
BBH = (*[250] * 21, 187, 146, 178)
"""Questions per sub-task of bbh."""


@pytest.mark.parametrize(("sizes", "discordance", "margin"), [(MMLU, 0.06, 0.0064), (BBH, 0.08, 0.0117)])
def test_sub_tasks_are_accepted_as_often_as_planned(sizes, discordance, margin):
    """200 evaluations in which every sub-task has a drop of its own, which makes the variance 1.5 times as large."""
    random, counts, rounds, accepted = np.random.default_rng(3), np.array(sizes), 200, 0
    total, clusters = sum(sizes), [str(i) for i, size in enumerate(sizes) for _ in range(size)]
    scatter = np.sqrt(0.5 * discordance * total / (counts**2).sum())
    for _ in range(rounds):
        drop = np.clip(random.normal(0, scatter, len(counts)), -discordance, discordance).repeat(counts)
        drawn = random.random(total)
        losses = np.where(drawn < (discordance + drop) / 2, 1.0, np.where(drawn < discordance, -1.0, 0.0))
        better = (losses > 0).astype(float)
        accepted += paired_test(better, better - losses, clusters, margin, 999).p_accept < 0.05
    planned = ClusterDesign(discordance**0.5, 0.05, (1.0,), len(sizes), 1.5).power(total, margin)
    assert planned == pytest.approx(0.8, abs=0.02)
    assert accepted / rounds == pytest.approx(planned, abs=0.07)


def test_graded_metrics_and_texts_of_uneven_length_are_accepted_as_often_as_planned():
    random, rounds = np.random.default_rng(6), 150
    graded, texts = 0, 0
    for _ in range(rounds):
        graded += (
            paired_test(np.full(817, 0.5), 0.5 - random.laplace(0, 0.1 / 2**0.5, 817), (), 0.0088, 999).p_accept < 0.05
        )
        words = random.lognormal(8, 0.6, 62)
        texts += ratio_bootstrap(words * random.normal(0, 0.01, 62), words, 0.0039, "", 999).p_accept < 0.05
    rules = {"tasks": {"mc2": limits(spread=0.1, margin=0.0088)}}
    rules["perplexity"] = {"texts": PerplexityPolicy(max_increase=float(np.expm1(0.0039)))}
    mc2, perplexity = plan_evaluation(policy(**rules), "unit", {"mc2": 817, "texts": 62}).tasks
    assert graded / rounds == pytest.approx(mc2.power, abs=0.07)
    assert texts / rounds == pytest.approx(perplexity.power, abs=0.07)
    assert (mc2.unit, perplexity.unit, perplexity.shown(perplexity.margin)) == ("points", "%", "0.39")


def test_a_mean_needs_as_many_samples_as_the_normal_approximation_says():
    needed = MeanDesign(0.2, 0.05).samples_needed(0.02, 0.8)
    assert needed == pytest.approx(6.18 * 0.2**2 / 0.02**2, rel=0.03)


def test_a_plan_states_its_assumption_and_needs_more_samples_where_drops_vary():
    few, many = ({"qa": limits(design_effect=effect)} for effect in (1.0, 3.0))
    one, other = (
        plan_evaluation(policy(tasks=rules), "unit", {"qa": 6000}, subtasks={"qa": 30}).tasks[0]
        for rules in (few, many)
    )
    assert (one.assumes, one.subtasks) == ("6 % of the answers differ, variance x 1 between sub-tasks", 30)
    assert other.samples_needed == pytest.approx(3 * one.samples_needed, rel=0.01)
    alone = plan_evaluation(policy(tasks=few), "unit", {"qa": 6000}).tasks[0]
    assert alone.samples_needed < one.samples_needed


def test_a_policy_on_a_group_of_too_few_sub_tasks_is_refused_at_any_margin():
    group = policy(tasks={"musr": limits(margin=0.5)})
    plan = plan_evaluation(group, "unit", {"musr": 756}, subtasks={"musr": 3})
    assert (plan.tasks[0].power, plan.tasks[0].samples_needed, plan.tasks[0].resolvable_margin) == (0.0, None, None)
    with pytest.raises(ConfigError, match="756 samples of 3 sub-tasks settle nothing, at least 20 are needed"):
        plan.require()
    plan_evaluation(group, "unit", {"musr": 756}, subtasks={"musr": 20}).require()


# ---------------------------------------------------------------------------------------------- refusals


def test_a_suite_too_small_for_its_policy_is_an_error_that_says_what_would_be_enough():
    plan = plan_evaluation(policy(), "unit", {"qa": 300})
    needed = plan.tasks[0].samples_needed
    with pytest.raises(
        ConfigError,
        match=rf"qa exact_match,none: 300 samples .*{needed} samples or a margin of 3\.\d\d points would do",
    ):
        plan.require()


def test_several_metrics_are_planned_to_be_accepted_together_at_the_last_look():
    rules = {name: limits() for name in ("a", "b")}
    together = plan_evaluation(policy(tasks=rules, looks=(0.5, 1.0)), "unit", {"a": 1319, "b": 1319})
    alone = Design(rules["a"].discordance, 0.025).power(1319, rules["a"].margin)
    assert [task.power for task in together.tasks] == [pytest.approx(alone)] * 2


def write(folder: Path, samples: int) -> list[str]:
    (folder / "s.yaml").write_text(f"name: s\ntasks: {{qa: {{documents: {samples}}}}}\n")
    (folder / "p.yaml").write_text("name: p\ntasks: {qa: {metric: acc, margin: 0.02}}\n")
    return ["plan-eval", "--policy", str(folder / "p.yaml"), "--suite", str(folder / "s.yaml")]


def test_the_command_reports_what_a_suite_resolves(tmp_path):
    answer = CliRunner().invoke(app, [*write(tmp_path, 2000), "--json"])
    assert answer.exit_code == 0
    (task,) = json.loads(answer.stdout)["tasks"]
    assert task["power"] > 0.95
    assert task["samples_needed"] < 2000


def test_the_command_refuses_a_suite_that_is_too_small(tmp_path):
    answer = CliRunner().invoke(app, write(tmp_path, 400))
    assert answer.exit_code == 2
    assert "asks for 80 %" in answer.stdout
