"""The ignore list that a plan writes: one pattern for each part that stays whole, exact names for the rest."""

from __future__ import annotations

import re

import pytest
from support.quantizing import Models
from support.tiny_models import plan_of, recipe

from fp8pipe.quantize.formats import kept_of

DECODER = [f"model.language_model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in ("attn.qkv_proj", "mlp.fc1")]
TOWER = [f"model.visual.blocks.{layer}.{leaf}" for layer in (0, 1) for leaf in ("attn.qkv", "mlp.gate_proj")]


def matches(entries: tuple[str, ...], name: str) -> bool:
    return any(re.match(entry.removeprefix("re:"), name) for entry in entries)


def test_a_tower_gets_one_pattern_that_covers_what_vllm_fuses_in_it_under_any_beginning() -> None:
    kept = kept_of(["lm_head", *TOWER], (), DECODER)
    assert (kept.modules, len(kept.patterns)) == (("lm_head",), 1)
    for beginning in ("", "model.", "thinker.model."):
        assert matches(kept.patterns, f"{beginning}visual.blocks.1.mlp.gate_up_proj")
    assert not any(matches(kept.patterns, name) for name in [*DECODER, "language_model.model.layers.0.visual_proj"])


def test_layers_behind_the_decoder_are_named_by_number() -> None:
    predictor = [f"model.layers.61.{leaf}" for leaf in ("eh_proj", "mlp.experts.0.up_proj")]
    decoder = [f"model.layers.{layer}.mlp.{leaf}" for layer in range(61) for leaf in ("up_proj", "experts.61.up_proj")]
    kept = kept_of(predictor, (), decoder)
    assert not kept.modules
    assert all(matches(kept.patterns, name) for name in predictor)
    assert not any(matches(kept.patterns, name) for name in [*decoder, "model.layers.6.mlp.up_proj"])


def test_a_part_whose_name_ends_like_one_with_quantized_modules_is_named_in_full() -> None:
    kept = kept_of(["layers.0.fc1", "encoder.layers.1.fc1"], (), ["model.layers.0.fc1", "model.layers.1.fc1"])
    assert all(matches(kept.patterns, name) for name in ("layers.0.fc1", "encoder.layers.1.fc1"))
    assert not any(matches(kept.patterns, name) for name in ("model.layers.0.fc1", "model.layers.1.fc1"))


def test_a_list_of_exact_names_has_those_of_fused_matrices(model_folder: Models) -> None:
    folder = model_folder("glm4v")
    ignored = plan_of(folder, recipe("autofp8-dynamic")).quantization_config["ignored_layers"]
    assert {f"model.visual.blocks.0.{leaf}" for leaf in ("attn.qkv", "mlp.gate_up_proj", "mlp.up_proj")} <= {*ignored}
    assert not any(entry.startswith("re:") for entry in ignored)


@pytest.mark.parametrize("name", ["glm4v", "qwen3-vl-moe", "step3p7"])
def test_a_models_tower_takes_one_entry_and_no_quantized_module_matches(model_folder: Models, name: str) -> None:
    plan = plan_of(model_folder(name), recipe())
    patterns = tuple(entry for entry in plan.quantization_config["ignore"] if entry.startswith("re:"))
    towers = {tensor.name for tensor in plan.tensors if "layers" not in tensor.name and ".weight" in tensor.name}
    assert any(matches(patterns, tensor) for tensor in towers)
    assert not any(matches(patterns, output.name) for output in plan.outputs if output.role == "weight")
    assert not any("vis" in entry for entry in plan.quantization_config["ignore"] if entry not in patterns)


def test_what_lies_alone_outside_the_layers_is_named_whatever_the_model_around_it_is_called() -> None:
    """Gemma 3n: vLLM asks for `model.self_decoder.per_layer_model_projection`."""
    kept = kept_of(["lm_head", "model.per_layer_model_projection"], (), [f"model.{name}" for name in DECODER])
    assert kept.modules == ("lm_head",)
    assert matches(kept.patterns, "model.self_decoder.per_layer_model_projection")
    assert not matches(kept.patterns, "model.self_decoder.per_layer_model_projection_norm")
