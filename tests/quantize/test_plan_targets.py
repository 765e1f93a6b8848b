"""A recipe's `targets` and `ignore` choose what is quantized; an entry that cannot be followed is an error."""

from __future__ import annotations

import re

import pytest
from support.quantizing import Models, kept
from support.tiny_models import plan_of, recipe

from fp8pipe.errors import ConfigError, UnmatchedEntry


def test_ignored_modules_are_kept_with_the_reason_and_named_in_the_config(model_folder: Models) -> None:
    plan = plan_of(
        model_folder("llama"), recipe(ignore=["model.layers.0.mlp.down_proj", r"re:.*layers\.1\.self_attn.*"])
    )
    names = {name for name, reason in kept(plan).items() if reason == "the recipe ignores it"}
    attention = {f"model.layers.1.self_attn.{leaf}_proj.weight" for leaf in "qkvo"}
    assert names == {"model.layers.0.mlp.down_proj.weight"} | attention
    ignore = plan.quantization_config["ignore"]
    assert {name.removesuffix(".weight") for name in names} < set(ignore)
    assert "lm_head" in ignore


def test_targets_restrict_what_is_quantized(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama"), recipe(targets=[r"re:.*mlp\.(gate|up)_proj"]))
    quantized = {tensor.name.split(".")[-2] for tensor in plan.tensors if tensor.action == "quantize"}
    assert quantized == {"gate_proj", "up_proj"}
    assert "model.layers.0.self_attn.q_proj" in plan.quantization_config["ignore"]


@pytest.mark.parametrize("field", ["targets", "ignore"])
@pytest.mark.parametrize("entry", ["model.layers.0.mlp.down_projection", "re:.*down_projj", r"re:layers\.0"])
def test_an_entry_that_matches_nothing_is_an_error_with_similar_names(
    model_folder: Models, field: str, entry: str
) -> None:
    with pytest.raises(UnmatchedEntry) as caught:
        plan_of(model_folder("llama"), recipe(**{field: [entry]}))
    assert field in str(caught.value) and entry.removeprefix("re:").replace("\\", "\\\\") in str(caught.value)
    if "down" in entry:
        assert re.search(r"similar names: .*mlp\.down_proj[,;]", str(caught.value))


def test_all_entries_that_match_nothing_are_reported_together(model_folder: Models) -> None:
    targets, ignore = ["Linear", "re:.*q_projj", "re:.*up_projj"], ["re:.*k_projj", "lm_head"]
    with pytest.raises(UnmatchedEntry) as caught:
        plan_of(model_folder("llama"), recipe(targets=targets, ignore=ignore))
    lines = str(caught.value).splitlines()
    assert [line.split(" matches ")[0] for line in lines] == [
        "targets: 're:.*q_projj'",
        "targets: 're:.*up_projj'",
        "ignore: 're:.*k_projj'",
    ]


@pytest.mark.parametrize(
    ("model", "entry", "reason"),
    [
        ("llama", "model.embed_tokens", "embedding"),
        ("llama", "model.layers.0.input_layernorm", "fewer than two dimensions"),
        ("llama", "lm_head", "lm_head"),
        ("llama", "re:.*norm", "fewer than two dimensions"),
        ("qwen3-moe", "model.layers.0.mlp.gate", "router"),
        ("gpt-oss", "model.layers.0.mlp.experts", "experts with biases"),
    ],
)
def test_a_target_that_cannot_be_quantized_is_an_error_with_the_reason(
    model_folder: Models, model: str, entry: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(repr(entry))} names .* cannot be quantized .*{reason}"):
        plan_of(model_folder(model), recipe(targets=["Linear", entry]))


def test_a_target_that_vllm_cannot_cut_into_blocks_is_an_error_with_the_reason(model_folder: Models) -> None:
    with pytest.raises(ConfigError, match="do not begin at blocks of 128"):
        plan_of(model_folder("llama"), recipe("fp8-block", targets=["re:.*(q|k|v)_proj"]))


def test_a_pattern_may_match_more_than_can_be_quantized(model_folder: Models) -> None:
    plan = plan_of(model_folder("qwen3-moe"), recipe(targets=["re:.*mlp"]))
    assert kept(plan)["model.layers.0.mlp.gate.weight"].startswith("router")
    assert any(tensor.action == "quantize" for tensor in plan.tensors)


def test_lm_head_of_a_tied_model_is_an_unmatched_target(model_folder: Models) -> None:
    with pytest.raises(UnmatchedEntry, match="lm_head"):
        plan_of(model_folder("llama-tied"), recipe(targets=["Linear", "lm_head"]))


def test_lm_head_always_counts_as_matched(model_folder: Models) -> None:
    plan_of(model_folder("llama-tied"), recipe(ignore=["lm_head"]))
    plan_of(model_folder("llama-tied"), recipe(ignore=["re:.*lm_head"]))


@pytest.mark.parametrize("field", ["targets", "ignore"])
@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("re:*", "no regular expression: nothing to repeat"),
        (r"re:.*mlp{gate}", "a brace that counts no repeats"),
        ("re:" + "(.*)" * 7 + r"\1\2(?!.|$)", "more than 0.1 s to match one name"),
    ],
)
def test_a_pattern_that_cannot_be_matched_is_a_config_error_with_the_reason(
    model_folder: Models, field: str, entry: str, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(model_folder("llama"), recipe(**{field: ["re:.*down_proj", entry]}))
    assert str(caught.value).startswith(f"{field}: {entry!r} cannot be matched: ") and reason in str(caught.value)


def test_entries_match_the_names_in_transformers_too(model_folder: Models) -> None:
    plan = plan_of(model_folder("mixtral"), recipe(ignore=["re:.*mlp.experts"]))
    assert not any("experts" in output.name for output in plan.outputs if output.role == "weight")
    assert r"re:.*layers\.0\.block_sparse_moe\.experts\..*" in plan.quantization_config["ignore"]


@pytest.mark.parametrize(
    ("model", "entry"),
    [("llama", "re:.*k_proj"), ("mixtral", r"re:.*experts\.2\.w1"), ("qwen3-moe", r"re:.*experts\.1\.")],
)
def test_keeping_part_of_what_vllm_fuses_is_an_error(model_folder: Models, model: str, entry: str) -> None:
    with pytest.raises(ConfigError, match="one precision"):
        plan_of(model_folder(model), recipe(ignore=[entry]))
