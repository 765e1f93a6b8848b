"""keep_bf16: the most sensitive Linears stay in BF16, in the groups that must have one precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import MOE_NAMES, STATIC_KV, TENSOR_KV, calibrated, make_model, planned, with_data

from fp8pipe.calibrate.sensitivity import worst_modules
from fp8pipe.config import KeepRule, Recipe, validated
from fp8pipe.errors import ConfigError, InputError
from fp8pipe.hub.headers import read_headers
from fp8pipe.quantize import fingerprint, quantize
from fp8pipe.quantize.plan import make_plan


def keeping(recipe: Recipe, share: Any) -> Recipe:
    return recipe.model_copy(update={"keep_bf16": KeepRule(worst=share)})


def test_share_is_read_as_percent_or_fraction() -> None:
    assert KeepRule.model_validate({"worst": "2%"}) == KeepRule.model_validate({"worst": 0.02})
    for wrong in ("0%", "51%", "two%", -1):
        with pytest.raises(ConfigError, match=r"worst"):
            validated(KeepRule, {"worst": wrong}, "recipe")


def test_the_most_sensitive_group_is_kept_whole_and_the_plan_says_why(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    with torch.no_grad():
        weight = model.get_parameter("model.layers.2.self_attn.k_proj.weight")
        weight[0, 0] = 3e4  # spoils the scale that q, k and v share
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    recipe = keeping(TENSOR_KV, "2%")
    found = calibrated(tmp_path, recipe)
    attention = {f"model.layers.2.self_attn.{leaf}_proj" for leaf in "qkv"}
    assert {name for name, _ in worst_modules(found, 2)} == attention - {"model.layers.2.self_attn.k_proj"}
    assert found.kept.keys() == {f"{name}.weight" for name in attention}

    snapshot, _, architecture = planned(tmp_path / "model", with_data(recipe, tmp_path / "data.jsonl"))
    settled = make_plan(snapshot, read_headers(snapshot), recipe, architecture, keep=found.kept)
    kept = {tensor.name: tensor.reason for tensor in settled.tensors if "keep_bf16" in tensor.reason}
    assert kept == found.kept
    assert all("worst 2 %" in reason and "dB" in reason for reason in kept.values())
    assert attention <= set(settled.quantization_config["ignore"])
    assert not attention & set(settled.calibrated_modules())
    made = quantize(snapshot, settled, tmp_path / "checkpoint", calibration=found)
    assert made.fingerprint == fingerprint(snapshot, recipe, found.digest())
    assert made.fingerprint != fingerprint(snapshot, recipe, found.model_copy(update={"kept": {}}).digest())


def test_a_plan_that_quantizes_what_calibration_keeps_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama")
    recipe = keeping(STATIC_KV, 0.1)
    found = calibrated(tmp_path, recipe)
    snapshot, unsettled, _ = planned(tmp_path / "model", with_data(recipe, tmp_path / "data.jsonl"))
    assert any("keep_bf16" in note for note in unsettled.notes)
    with pytest.raises(InputError, match="plan again"):
        quantize(snapshot, unsettled, tmp_path / "checkpoint", calibration=found)
    with pytest.raises(InputError, match="needs a calibration"):
        quantize(snapshot, unsettled, tmp_path / "checkpoint")


@pytest.mark.parametrize("name", MOE_NAMES)
def test_experts_of_a_layer_are_kept_together(name: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model", name)
    recipe = keeping(TENSOR_KV, "40%")
    found = calibrated(tmp_path, recipe)
    snapshot, _, architecture = planned(tmp_path / "model", with_data(recipe, tmp_path / "data.jsonl"))
    make_plan(snapshot, read_headers(snapshot), recipe, architecture, keep=found.kept)  # raises for a mixed layer


def test_data_free_recipe_that_keeps_the_worst_needs_calibration() -> None:
    plain = Recipe(name="r")
    assert not plain.needs_calibration
    assert keeping(plain, "2%").needs_calibration
    assert "keep_bf16" not in plain.identity()
    assert keeping(plain, "2%").identity()["keep_bf16"] == {"worst": 0.02}


def test_a_weight_only_recipe_can_keep_the_worst(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama")
    found = calibrated(tmp_path, keeping(Recipe(name="r", activations=None, calibration=STATIC_KV.calibration), 0.1))
    assert not found.inputs
    assert found.kept
    assert all(one.output_sqnr_db > 25 for one in found.sensitivity.values())
