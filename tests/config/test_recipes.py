"""llm-compressor's recipe files: read as what they mean, and refused by key where they cannot be honoured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_models import make_model, plan_of
from typer.testing import CliRunner

from fp8pipe.cli import app
from fp8pipe.config import ActivationScheme, KVCacheScheme, Recipe, ReleaseSpec, WeightScheme, load_recipe
from fp8pipe.errors import ConfigError, UnmatchedEntry

EXAMPLE = """
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      ignore: ["lm_head"]
      config_groups:
        group_0:
          weights:
            num_bits: 8
            type: float
            strategy: tensor
            dynamic: false
            symmetric: true
          input_activations:
            num_bits: 8
            type: float
            strategy: tensor
            dynamic: false
            symmetric: true
          targets: ["Linear"]
      kv_cache_scheme:
        num_bits: 8
        type: float
        strategy: tensor
        dynamic: false
        symmetric: true
"""
"""The recipe of llm-compressor's own example of an FP8 KV cache."""

WRITTEN = """
default_stage:
  default_modifiers:
    QuantizationModifier:
      targets: [Linear]
      ignore: [lm_head]
      scheme: FP8
      kv_cache_scheme: {num_bits: 8, type: float, symmetric: true, group_size: null, strategy: tensor,
        block_structure: null, dynamic: false, actorder: null, scale_dtype: null, zp_dtype: null,
        observer: static_minmax, observer_kwargs: {}}
      bypass_divisibility_checks: false
"""
"""What llm-compressor 0.14 writes as recipe.yaml beside a checkpoint."""


def load(tmp_path: Path, content: str | dict[str, Any], name: str = "mine.yaml") -> Recipe:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_recipe(str(path))


def modifier(**fields: Any) -> dict[str, Any]:
    return {"quant_stage": {"quant_modifiers": {"QuantizationModifier": fields}}}


@pytest.mark.parametrize("text", [EXAMPLE, WRITTEN], ids=["example", "written"])
def test_example_and_what_it_writes_mean_our_recipe(tmp_path: Path, text: str) -> None:
    found = load(tmp_path, text, "FP8 KV.yaml")
    ours = load_recipe("fp8-static-kv")
    assert found.identity() | {"ignore": []} == ours.identity()
    assert (found.name, found.ignore, found.repo_suffix) == ("fp8-kv", ("lm_head",), "-FP8-KV")


@pytest.mark.parametrize(
    ("preset", "same_as"), [("FP8", "fp8-static"), ("FP8_DYNAMIC", "fp8-dynamic"), ("FP8_BLOCK", "fp8-block")]
)
def test_presets_are_our_recipes(tmp_path: Path, preset: str, same_as: str) -> None:
    ours = load_recipe(same_as)
    for fields in ({"scheme": preset}, {"scheme": {preset: ["Linear"]}}, {"scheme": preset.lower()}):
        found = load(tmp_path, modifier(targets="Linear", **fields))
        assert found.identity() == ours.identity()
        assert found.repo_suffix == ours.repo_suffix


@pytest.mark.parametrize(
    "content",
    [
        {"QuantizationModifier": {"scheme": "FP8"}},
        {"quant_modifiers": {"QuantizationModifier": {"scheme": "FP8"}}},
        {"quant_stage": {"run_type": "oneshot", "quant_modifiers": {"QuantizationModifier": {"scheme": "FP8"}}}},
    ],
)
def test_stages_and_groups_may_be_left_out(tmp_path: Path, content: dict[str, Any]) -> None:
    assert load(tmp_path, content).identity() == load_recipe("fp8-static").identity()


FP8 = {"num_bits": 8, "type": "float"}


def test_explicit_groups_are_read_field_by_field(tmp_path: Path) -> None:
    groups = {
        "group_0": {
            "targets": ["re:.*mlp.*"],
            "weights": FP8 | {"strategy": "channel", "observer": "mse"},
            "input_activations": FP8 | {"strategy": "token", "dynamic": True, "observer": None},
        },
        "group_1": {
            "targets": ["re:.*self_attn.*"],
            "weights": FP8 | {"strategy": "channel", "observer": "memoryless_mse"},
            "input_activations": FP8 | {"strategy": "token", "dynamic": True},
        },
    }
    kv = FP8 | {"strategy": "attn_head", "observer": "mse"}
    found = load(tmp_path, modifier(config_groups=groups, kv_cache_scheme=kv))
    assert found.weights == WeightScheme(strategy="channel", observer="mse")
    assert found.activations == ActivationScheme(mode="dynamic", strategy="token")
    assert found.kv_cache == KVCacheScheme(strategy="head", observer="mse")
    assert found.targets == ("re:.*mlp.*", "re:.*self_attn.*")


def test_weight_only_group(tmp_path: Path) -> None:
    found = load(tmp_path, modifier(config_groups={"g": {"weights": FP8 | {"strategy": "channel"}}}))
    assert found.activations is None


def test_observers_named_at_the_modifier_go_before_those_of_the_scheme(tmp_path: Path) -> None:
    found = load(tmp_path, modifier(scheme="FP8", weight_observer="mse", observer={"input": "MSE"}))
    assert found.weights.observer == "mse"
    assert found.activations is not None
    assert found.activations.observer == "mse"


ACTS = {"weights": FP8 | {"strategy": "tensor"}, "input_activations": FP8 | {"strategy": "tensor"}}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another preset": (modifier(scheme="NVFP4"), r"QuantizationModifier\.scheme: preset NVFP4"),
    "another modifier": (
        {"s_stage": {"s_modifiers": {"GPTQModifier": {}, "QuantizationModifier": {"scheme": "FP8"}}}},
        r"s_stage\.s_modifiers\.GPTQModifier",
    ),
    "two modifiers": (
        {"a_stage": modifier(scheme="FP8")["quant_stage"], "b_stage": modifier(scheme="FP8")["quant_stage"]},
        "found 2",
    ),
    "no modifier": ({"s_stage": {}}, "found 0"),
    "training": ({"s_stage": {"run_type": "train"}}, r"s_stage\.run_type: train"),
    "unknown key": (modifier(scheme="FP8", start=0.5), r"QuantizationModifier\.start: cannot be honoured"),
    "nothing": (modifier(ignore=[]), "either scheme or config_groups"),
    "both": (modifier(scheme="FP8", config_groups={"g": ACTS}), "either scheme or config_groups"),
    "integers": (
        modifier(config_groups={"g": {"weights": {"num_bits": 8, "strategy": "channel"}}}),
        r"config_groups\.g\.weights\.type: int cannot be honoured, expected float",
    ),
    "four bits": (
        modifier(config_groups={"g": {"weights": FP8 | {"num_bits": 4, "strategy": "channel"}}}),
        r"g\.weights\.num_bits: 4",
    ),
    "asymmetric": (
        modifier(config_groups={"g": {"weights": FP8 | {"symmetric": False, "strategy": "tensor"}}}),
        r"g\.weights\.symmetric: False",
    ),
    "weights in groups": (
        modifier(config_groups={"g": {"weights": FP8 | {"group_size": 128}}}),
        r"g\.weights\.strategy: group cannot be honoured here",
    ),
    "static per token": (
        modifier(config_groups={"g": ACTS | {"input_activations": FP8 | {"strategy": "token"}}}),
        r"g\.input_activations\.strategy: token",
    ),
    "outputs": (
        modifier(config_groups={"g": ACTS | {"output_activations": FP8}}),
        r"g\.output_activations",
    ),
    "two schemes": (
        modifier(config_groups={"a": ACTS, "b": {"weights": FP8 | {"strategy": "channel"}}}),
        r"config_groups\.b: differs from .*config_groups\.a",
    ),
    "observer": (
        modifier(config_groups={"g": {"weights": FP8 | {"strategy": "tensor", "observer": "imatrix_mse"}}}),
        r"weights\.observer: imatrix_mse",
    ),
    "observer settings": (
        modifier(scheme="FP8", kv_cache_scheme=FP8 | {"observer_kwargs": {"averaging_constant": 0.1}}),
        r"kv_cache_scheme\.observer_kwargs",
    ),
    "dynamic cache": (
        modifier(scheme="FP8", kv_cache_scheme=FP8 | {"strategy": "tensor", "dynamic": True}),
        r"kv_cache_scheme\.dynamic: True",
    ),
    "order of activations": (
        modifier(config_groups={"g": {"weights": FP8 | {"strategy": "channel", "actorder": "static"}}}),
        r"weights\.actorder: static",
    ),
    "16-bit scales": (
        modifier(config_groups={"g": {"weights": FP8 | {"strategy": "channel", "scale_dtype": "torch.bfloat16"}}}),
        r"weights\.scale_dtype",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_an_error_that_names_file_and_key(tmp_path: Path, case: str) -> None:
    content, expected = REFUSED[case]
    with pytest.raises(ConfigError, match=expected) as caught:
        load(tmp_path, content)
    assert "mine.yaml" in str(caught.value)


def test_file_is_accepted_wherever_a_recipe_is(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(EXAMPLE)
    spec = ReleaseSpec(model="o/m", repo_id="o/m-FP8", recipe=str(path), suite="quick", policy="quick")
    assert spec.resolve().recipe.kv_cache == KVCacheScheme()
    model = make_model(tmp_path / "model")
    answer = CliRunner().invoke(app, ["plan", str(model), "--recipe", str(path), "--json"])
    assert answer.exit_code == 0, answer.output
    assert '"theirs"' in answer.stdout


def test_ignore_that_matches_nothing_is_a_note_there_and_an_error_in_ours(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    theirs = load(tmp_path, modifier(scheme="FP8_DYNAMIC", ignore=["lm_head", "re:.*vision_tower.*"]))
    plan = plan_of(model, theirs)
    assert [note for note in plan.notes if "vision_tower" in note]
    assert not any("lm_head" in note for note in plan.notes)
    ours = theirs.model_copy(update={"unmatched_ignore": "error"})
    with pytest.raises(UnmatchedEntry, match="vision_tower"):
        plan_of(model, ours)
    assert ours.identity() == theirs.identity()
