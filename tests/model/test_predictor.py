"""Layers that predict a second token are found by name, and kept under every name by which vLLM asks for them."""

from __future__ import annotations

import pytest

from fp8pipe.config import load_recipe
from fp8pipe.model.architecture import Architecture, TensorRole
from fp8pipe.model.headers import Headers, TensorInfo
from fp8pipe.model.patterns import Patterns
from fp8pipe.model.predictor import REASON, predictor_of, predictors_of, renumbered
from fp8pipe.quantize.plan.choose import choose
from fp8pipe.quantize.plan.layout import quantization_config

FAMILIES = {
    "deepseek": (
        ("model.layers.2.eh_proj", "model.layers.2.self_attn.q_a_proj", "model.layers.2.mlp.experts.0.up_proj"),
        ("model.layers.2.eh_proj", "model.layers.2.self_attn.fused_qkv_a_proj", "model.layers.2.mlp.experts.0.up_proj"),
    ),
    "qwen": (
        ("mtp.fc", "mtp.layers.0.self_attn.q_proj", "mtp.layers.0.mlp.experts.gate_up_proj:3"),
        ("mtp.fc", "mtp.layers.0.self_attn.qkv_proj", "mtp.layers.0.mlp.experts.0.gate_proj"),
    ),
    "mimo": (
        ("model.mtp_layers.0.input_proj", "model.mtp_layers.0.mlp.up_proj"),
        ("model.layers.2.input_proj", "model.layers.2.mlp.gate_up_proj"),
    ),
    "ernie": (
        ("model.mtp_block.0.self_attn.o_proj", "model.mtp_linear_proj.0"),
        ("model.layers.2.self_attn.o_proj", "model.mtp_linear_proj.0"),
    ),
}
"""Modules on disk of a model with two layers, and names by which vLLM's *_mtp.py ask for them."""


def architecture(modules: tuple[str, ...]) -> tuple[Headers, Architecture]:
    """One quantizable Linear in the decoder, and `modules` that transformers does not know; `:3` is a 3-D tensor."""
    shapes = {"model.layers.0.mlp.down_proj.weight": (128, 128)}
    for module in modules:
        name, _, three = module.partition(":")
        shapes[name if three else f"{name}.weight"] = (2, 128, 128) if three else (128, 128)
    tensors = {name: TensorInfo(name, "BF16", shape, "model.safetensors", 0, 0) for name, shape in shapes.items()}
    roles = {name: TensorRole(kind="unused", reason="transformers has no such tensor") for name in shapes}
    roles["model.layers.0.mlp.down_proj.weight"] = TensorRole(kind="linear", module="model.layers.0.mlp.down_proj")
    return Headers((), tensors), Architecture(
        model_class="LlamaForCausalLM",
        model_type="llama",
        transformers_version="5",
        tensors=roles,
        attention=(),
        num_layers=2,
        layers_module="model.layers",
        tied_embeddings=True,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["fp8-dynamic", "autofp8-dynamic"])
def test_every_name_by_which_vllm_asks_is_ignored(family: str, recipe: str) -> None:
    on_disk, asked = FAMILIES[family]
    headers, known = architecture(on_disk)
    wanted = load_recipe(recipe)
    choices = choose(headers, wanted, known)
    assert len(predictors_of(known)) == len({predictor_of(name, 2) for name in headers.tensors} - {""})
    assert {choice.reason for name, choice in choices.items() if known.tensors[name].kind == "unused"} == {REASON}
    config = quantization_config(headers, wanted, known, choices, ())
    if recipe == "fp8-dynamic":
        patterns = Patterns(config["ignore"])
        assert all(patterns.matches(name) for name in asked)
        assert not patterns.matches("model.layers.0.mlp.down_proj")
        return
    ignored = config["ignored_layers"]  # exact names: those of the shards, and of the experts' holder
    parts = {"qkv_proj": "q_proj", "fused_qkv_a_proj": "q_a_proj", "gate_up_proj": "up_proj"}
    for name in asked:
        parent, _, leaf = name.rpartition(".")
        shard = f"{parent}.{parts.get(leaf, leaf)}"
        assert shard in ignored or any(".experts" in entry and shard.startswith(f"{entry}.") for entry in ignored), name
    assert "model.layers.0.mlp.down_proj" not in ignored


def test_other_unknown_tensors_are_no_predictors() -> None:
    names = ["model.layers.1.extra.weight", "visual.blocks.0.extra.weight", "model.embed_positions.weight"]
    assert [predictor_of(name, 2) for name in names] == ["", "", ""]


def test_numbers_from_zero_on_continue_those_of_the_decoder() -> None:
    assert renumbered("model.mtp_layers.1.mlp.up_proj", 36) == "model.layers.37.mlp.up_proj"
    assert renumbered("mtp.layers.0.mlp.up_proj", 36) == "mtp.layers.0.mlp.up_proj"
    assert renumbered("model.layers.36.mlp.up_proj", 36) == "model.layers.36.mlp.up_proj"
