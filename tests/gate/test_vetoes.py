"""The rules: one test for every way in which two reports may not be compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.decisions import decide_fully, flags, vetoes_of
from support.reports import (
    KERNEL,
    change_engine,
    change_task,
    metric,
    pair,
    policy,
    recipe,
    suite,
    task,
    values,
)

from fp8pipe.config import EvalSuite, TaskPolicy, TaskSpec
from fp8pipe.gate import decide
from fp8pipe.records import EvalReport


def shortened(side: EvalReport, keep: slice) -> EvalReport:
    """The report with some samples cut out of every tuple."""
    old = side.tasks[0]
    per_sample = ("doc_ids", "doc_hashes", "prompt_hashes", "target_hashes")
    fields: dict[str, Any] = {name: getattr(old, name)[keep] for name in per_sample}
    return change_task(side, 0, **fields, metrics=(metric(old.metrics[0].values[keep]),))


def test_missing_samples_are_vetoed_on_either_side_and_on_both() -> None:
    baseline, candidate = pair()
    asked = {"suite": suite(2000)}
    assert vetoes_of(baseline, shortened(candidate, slice(0, 1999)), **asked) == ("samples", "completeness")
    assert vetoes_of(shortened(baseline, slice(0, 1999)), candidate, **asked) == ("samples", "completeness")
    both = [shortened(side, slice(0, 1999)) for side in (baseline, candidate)]
    assert vetoes_of(*both, **asked) == ("completeness",)


def test_a_suite_that_scores_the_whole_dataset_vetoes_fewer_samples() -> None:
    counted = EvalSuite(name="unit", tasks={"qa": TaskSpec(documents=2000)})
    assert decide_fully(*pair(), suite=counted).vetoed == ()
    assert vetoes_of(*pair(1999), suite=counted) == ("completeness",)
    part = EvalSuite(name="unit", tasks={"qa": TaskSpec(documents=4000, samples=2000)})
    assert decide_fully(*pair(), suite=part).vetoed == ()


def test_extra_samples_on_both_sides_are_vetoed() -> None:
    assert vetoes_of(*pair(2001), suite=suite(2000)) == ("completeness",)


def test_completeness_is_unchecked_where_nothing_says_how_many_documents_there_are() -> None:
    all_of_it = EvalSuite(name="unit", tasks={"qa": TaskSpec()})
    assert "completeness" in decide_fully(*pair(), suite=all_of_it).unchecked
    known = [change_task(side, 0, available=2000) for side in pair()]
    assert "completeness" not in decide_fully(*known, suite=all_of_it).unchecked
    part = [change_task(side, 0, available=3000) for side in pair()]
    assert vetoes_of(*part, suite=all_of_it) == ("completeness",)


def test_each_look_requires_its_own_number_of_samples() -> None:
    rules = policy(looks=(0.25, 1.0))
    assert decide_fully(*pair(500, right=450), rules, suite=suite(2000), look=1).vetoed == ()
    assert decide_fully(*pair(500, right=450), rules, suite=suite(2000), look=2).vetoed == ("completeness",)


def test_a_sample_scored_twice_is_vetoed() -> None:
    ids = (0, 0, *range(2, 2000))
    baseline, candidate = (change_task(side, doc_ids=ids) for side in pair())
    assert vetoes_of(baseline, candidate) == ("samples",)


@pytest.mark.parametrize("kind", ["doc_hashes", "prompt_hashes", "target_hashes"])
def test_one_differing_hash_is_vetoed(kind: str) -> None:
    baseline, candidate = pair()
    hashes = list(getattr(candidate.tasks[0], kind))
    hashes[77] = "other"
    changed = change_task(candidate, 0, **{kind: tuple(hashes)})
    decision = decide_fully(baseline, changed)
    assert decision.vetoed == ("samples",)
    assert "documents 77" in decision.reason


def test_samples_in_another_order_are_vetoed() -> None:
    baseline, candidate = pair()
    assert "samples" in vetoes_of(baseline, change_task(candidate, doc_ids=tuple(reversed(range(2000)))))


def test_samples_in_different_clusters_are_vetoed() -> None:
    baseline, candidate = pair()
    clustered = change_task(candidate, clusters=tuple(f"c{i % 40}" for i in range(2000)))
    assert vetoes_of(baseline, clustered) == ("samples",)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_is_vetoed(value: float, side: int) -> None:
    sides = list(pair())
    spoiled = (value, *sides[side].tasks[0].metrics[0].values[1:])
    sides[side] = change_task(sides[side], metrics=(metric(spoiled, mean=0.9),))
    assert "metrics" in vetoes_of(*sides)


def test_a_mean_that_is_not_finite_is_vetoed() -> None:
    baseline, candidate = pair()
    kept = candidate.tasks[0].metrics[0].values
    assert vetoes_of(baseline, change_task(candidate, metrics=(metric(kept, mean=math.nan),))) == ("metrics",)


def test_a_mean_that_differs_from_that_of_its_samples_is_vetoed() -> None:
    baseline, candidate = pair()
    kept = candidate.tasks[0].metrics[0].values
    assert vetoes_of(baseline, change_task(candidate, metrics=(metric(kept, mean=0.99),))) == ("metrics",)


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
    assert "metrics" in vetoes_of(*spoil(metrics=()))
    assert "metrics" in vetoes_of(*spoil(metrics=same * 2))
    assert "metrics" in vetoes_of(*spoil(metrics=(same[0].model_copy(update={"filter": "strict"}),)))
    assert "metrics" in vetoes_of(*spoil(task="other"))
    assert "metrics" in vetoes_of(*repeat(2))
    assert "metrics" in vetoes_of(*repeat(0))


def test_a_task_that_only_one_side_has_is_vetoed() -> None:
    baseline, candidate = pair()
    extra = candidate.model_copy(update={"tasks": (*candidate.tasks, task(values(5, 10), name="extra"))})
    assert vetoes_of(baseline, extra) == ("metrics",)


def test_fewer_values_than_documents_are_vetoed() -> None:
    baseline, candidate = pair()
    assert "metrics" in vetoes_of(baseline, change_task(candidate, metrics=(metric(values(1819, 1999)),)))


def test_opposite_directions_are_vetoed() -> None:
    baseline, candidate = pair()
    kept = candidate.tasks[0].metrics[0].values
    turned = change_task(candidate, metrics=(metric(kept, higher_is_better=False),))
    assert vetoes_of(baseline, turned) == ("metrics",)


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
    assert vetoes_of(baseline, candidate.model_copy(update=fields)) == (rule,)


@pytest.mark.parametrize(("rule", "fields"), [("versions", {"version": "2.0"}), ("shots", {"num_fewshot": 5})])
def test_a_task_measured_differently_is_vetoed(rule: str, fields: dict[str, Any]) -> None:
    baseline, candidate = pair()
    assert vetoes_of(baseline, change_task(candidate, **fields)) == (rule,)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("context", {"max_model_len": 256}),
        ("dtype", {"dtype": "float16"}),
        ("device", {"device_class": "ada"}),
        ("parallelism", {"arguments": {"tensor_parallel_size": 2}}),
        ("parallelism", {"arguments": {"data_parallel_size": 2}}),
        ("parallelism", {"arguments": {"enable_expert_parallel": True}}),
        ("kernels", {"linear_kernels": ("MarlinFP8ScaledMMLinearKernel",)}),
        ("kernels", {"linear_kernels": (KERNEL, "MarlinFP8ScaledMMLinearKernel")}),
        ("kernels", {"linear_kernels": ("CPUFp8PerTensorScaledMMLinearKernel",)}),
        ("kernels", {"quantization": None, "linear_kernels": ()}),
        ("kv_cache", {"kv_cache_dtype": "auto"}),
    ],
)
def test_a_candidate_served_differently_is_vetoed(rule: str, fields: dict[str, Any]) -> None:
    baseline, candidate = pair()
    assert vetoes_of(baseline, change_engine(candidate, **fields)) == (rule,)


def test_a_quantized_baseline_is_vetoed() -> None:
    baseline, candidate = pair()
    assert vetoes_of(change_engine(baseline, quantization="fp8"), candidate) == ("kernels",)
    assert vetoes_of(change_engine(baseline, kv_cache_dtype="fp8_e4m3"), candidate) == ("kv_cache",)


def test_a_baseline_of_another_model_is_vetoed() -> None:
    baseline, candidate = pair()
    assert vetoes_of(baseline.model_copy(update={"fingerprint": "6" * 40}), candidate) == ("fingerprint",)


def test_a_recipe_other_than_the_checkpoints_is_vetoed() -> None:
    assert vetoes_of(*pair(), recipe=recipe(name="fp8-static")) == ("fingerprint",)


def test_an_fp8_cache_that_the_recipe_does_not_have_is_vetoed() -> None:
    assert vetoes_of(*pair(), recipe=recipe(kv_cache=None)) == ("kv_cache",)


def test_a_weight_only_recipe_expects_weight_only_kernels() -> None:
    baseline, candidate = pair()
    weight_only = recipe(activations=None)
    assert vetoes_of(baseline, candidate, recipe=weight_only) == ("kernels",)
    marlin = change_engine(candidate, linear_kernels=("MarlinFP8ScaledMMLinearKernel",))
    assert vetoes_of(baseline, marlin, recipe=weight_only) == ()


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
def test_kernels_of_8_bit_activations_serve_a_w8a8_recipe(kernel: str) -> None:
    baseline, candidate = pair()
    assert vetoes_of(baseline, change_engine(candidate, linear_kernels=(kernel,))) == ()


@pytest.mark.parametrize("kernel", ["MarlinExperts(fp8_w8a16)", "ReferenceFp8W8A16LinearKernel", "TritonExperts(None)"])
def test_other_kernels_are_vetoed_for_a_w8a8_recipe(kernel: str) -> None:
    baseline, candidate = pair()
    assert vetoes_of(baseline, change_engine(candidate, linear_kernels=(kernel,))) == ("kernels",)


def test_a_device_that_the_policy_does_not_name_is_vetoed() -> None:
    baseline, candidate = (change_engine(side, device_class="cpu") for side in pair())
    assert vetoes_of(baseline, candidate) == ("device",)
    assert decide_fully(baseline, candidate, policy(device_classes=("cpu",))).verdict == "accepted"


def test_a_baseline_at_chance_is_vetoed() -> None:
    assert vetoes_of(*pair(right=600)) == ("chance",)  # 0.3, the policy's min_baseline


def test_a_checkpoint_above_the_size_limit_is_vetoed() -> None:
    assert decide_fully(*pair(), policy(max_size_ratio=0.5)).vetoed == ("size",)
    assert decide_fully(*pair(), policy(max_size_ratio=0.6)).vetoed == ()


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
    assert vetoes_of(flagged(baseline, before), flagged(candidate, after)) == ((rule,) if is_veto else ())
    assert vetoes_of(flagged(baseline, 10), candidate) == (rule,)  # recorded on one side only


def test_a_large_but_uncertain_rise_of_truncations_does_not_veto() -> None:
    before = tuple(i < 6 for i in range(200))
    after = tuple(6 <= i < 15 for i in range(200))
    baseline, candidate = pair(200, right=180)
    sides = change_task(baseline, truncated=before), change_task(candidate, truncated=after)
    assert vetoes_of(*sides) == ()


def test_without_checkpoint_suite_and_recipe_their_rules_are_unchecked_and_numbers_decide() -> None:
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
def test_a_fact_that_a_report_lacks_leaves_its_rule_unchecked(rule: str, fields: dict[str, Any]) -> None:
    baseline, candidate = pair()
    assert decide_fully(baseline.model_copy(update=fields), candidate).unchecked == (rule,)


def test_unrecorded_hashes_kernels_and_chance_levels_are_unchecked() -> None:
    baseline, candidate = pair()
    assert decide_fully(baseline, change_task(candidate, prompt_hashes=())).unchecked == ("samples",)
    assert decide_fully(baseline, change_engine(candidate, linear_kernels=())).unchecked == ("kernels",)
    unnamed = policy(tasks={"qa": TaskPolicy(metric="exact_match", margin=0.02)})
    assert decide_fully(baseline, candidate, unnamed).unchecked == ("chance",)
