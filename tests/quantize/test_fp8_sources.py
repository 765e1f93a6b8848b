"""A source that is FP8 already: refused, or dequantized and quantized again, as the recipe says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.numerics import expanded, reference_amax, reference_codes
from support.quantizing import Models, edit_config, edit_tensors, make, same_bytes, tensors_of
from support.tiny_models import plan_of, recipe
from torch import Tensor

from fp8pipe.errors import InputError, UnsupportedArchitecture

Tensors = dict[str, Tensor]
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def projections(tensors: Tensors) -> list[str]:
    return [name for name in tensors if name.endswith("_proj.weight")]


def in_blocks(folder: Path, origin: Path, method: str = "fp8") -> Path:
    """A copy of a tiny Llama with block scales, as DeepSeek publishes its models; its values mean nothing."""

    def as_blocks(tensors: Tensors) -> None:
        for name in projections(tensors):
            rows, columns = tensors[name].shape
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((-(-rows // 128), -(-columns // 128)), 0.5)

    shutil.copytree(origin, folder)
    edit_tensors(folder, as_blocks)
    edit_config(folder, quantization_config={"quant_method": method, "weight_block_size": [128, 128]})
    return folder


# ---------------------------------------------------------------------------------------------- the plan


def test_an_fp8_source_is_refused_or_requantized_as_the_recipe_says(model_folder: Models, tmp_path: Path) -> None:
    folder = in_blocks(tmp_path / "fp8", model_folder("llama", shard_size="1GB"))
    with pytest.raises(InputError, match="fp8_source: requantize"):
        plan_of(folder, recipe())
    plan = plan_of(folder, recipe(fp8_source="requantize", ignore=["re:.*down_proj"]))
    actions = {tensor.name: tensor for tensor in plan.tensors}
    assert actions["model.layers.0.self_attn.q_proj.weight"].action == "quantize"
    assert actions["model.layers.0.self_attn.q_proj.weight_scale_inv"].action == "drop"
    outputs = {output.name: output for output in plan.outputs}
    down = outputs["model.layers.0.mlp.down_proj.weight"]
    assert (down.role, down.dtype) == ("dequantize", "BF16")
    assert not any(name.endswith("scale_inv") for name in outputs)


@pytest.mark.parametrize(
    ("block", "scale", "names"),
    [
        ([128, 128], torch.ones(4, 4), r"weight_scale_inv: F32 \[4, 4\] for a weight of \[256, 512\], .* \[2, 4\]"),
        ([128, 128], torch.ones(1, 1), r"F32 \[1, 1\] .*\[2, 4\]"),
        ([128, 128], torch.ones(4, 2), r"F32 \[4, 2\] .*\[2, 4\]"),
        ([128, 128], torch.ones(8), r"F32 \[8\] .*\[2, 4\]"),
        ([128, 128], torch.ones(2, 4, dtype=torch.uint8), r"U8 \[2, 4\] .*F32, BF16"),
        ([128, 128], torch.ones(2, 4, dtype=torch.float64), "F64"),
        (None, torch.ones(2, 4), r"F32 \[2, 4\] .*\[256, 1\] \(config.json has no weight_block_size\)"),
        (None, torch.ones(512), r"F32 \[512\] "),
        ([128], torch.ones(2, 4), r"weight_block_size is \[128\], expected two sizes"),
        ([0, 128], torch.ones(2, 4), "expected two sizes"),
        ("128", torch.ones(2, 4), "expected two sizes"),
    ],
)
def test_scales_that_do_not_fit_their_weight_are_refused_by_name(
    model_folder: Models, tmp_path: Path, block: Any, scale: Tensor, names: str
) -> None:
    wide = model_folder("llama", shard_size="1GB", hidden_size=256, num_attention_heads=8, head_dim=64)
    folder = in_blocks(tmp_path / "fp8", wide)

    def with_scale(tensors: Tensors) -> None:
        for name in projections(tensors):
            rows, columns = tensors[name].shape
            shape = (-(-rows // 128), -(-columns // 128)) if block is not None else (rows, 1)
            tensors[f"{name}_scale_inv"] = torch.ones(shape)
        tensors[f"{O_PROJ}_scale_inv"] = scale

    edit_tensors(folder, with_scale)
    blocks = {} if block is None else {"weight_block_size": block}
    edit_config(folder, quantization_config={"quant_method": "fp8"} | blocks)
    with pytest.raises(InputError, match=names) as caught:
        plan_of(folder, recipe(fp8_source="requantize"))
    assert O_PROJ in str(caught.value) or "weight_block_size is" in str(caught.value)


def test_fp8_codes_without_scales_are_refused_by_name(model_folder: Models, tmp_path: Path) -> None:
    folder = in_blocks(tmp_path / "fp8", model_folder("llama", shard_size="1GB"))
    edit_tensors(folder, lambda tensors: tensors.pop(f"{O_PROJ}_scale_inv"))
    with pytest.raises(InputError, match=rf"{re.escape(O_PROJ)}: F8_E4M3 without weight_scale_inv or weight_scale"):
        plan_of(folder, recipe(fp8_source="requantize"))


@pytest.mark.parametrize("leaf", ["gate_up_proj", "gate_up_proj.weight"])
def test_fp8_experts_in_one_tensor_are_refused_by_name(model_folder: Models, tmp_path: Path, leaf: str) -> None:
    folder = in_blocks(tmp_path / "fp8", model_folder("llama", shard_size="1GB"))
    name = f"model.layers.0.mlp.experts.{leaf}"
    codes = torch.zeros(2, 128, 64).to(torch.float8_e4m3fn)
    edit_tensors(folder, lambda tensors: tensors.update({name: codes, f"{name}_scale_inv": torch.ones(2, 1, 1)}))
    with pytest.raises(InputError, match=rf"{re.escape(name)}: F8_E4M3 \[2, 128, 64\].*2-D"):
        plan_of(folder, recipe(fp8_source="requantize"))


def test_a_source_of_another_quant_method_is_refused(model_folder: Models, tmp_path: Path) -> None:
    folder = in_blocks(tmp_path / "awq", model_folder("llama", shard_size="1GB"), method="awq")
    with pytest.raises(UnsupportedArchitecture, match="awq"):
        plan_of(folder, recipe(fp8_source="requantize"))


# ---------------------------------------------------------------------------------------------- the bytes


def quantized_source(
    folder: Path, origin: Path, quantize: Callable[[str, Tensor], tuple[Tensor, dict[str, Tensor]]]
) -> dict[str, Tensor]:
    """Copy a model to `folder` in FP8; the exact values of its weights. `quantize`: name, weight -> values, tensors."""
    exact: dict[str, Tensor] = {}

    def as_fp8(tensors: Tensors) -> None:
        for name in projections(tensors):
            exact[name], replaced = quantize(name, tensors[name])
            tensors |= replaced

    shutil.copytree(origin, folder)
    edit_tensors(folder, as_fp8)
    return exact


def test_block_scales_are_dequantized_and_the_weights_quantized_again(model_folder: Models, tmp_path: Path) -> None:
    def by_blocks(name: str, weight: Tensor) -> tuple[Tensor, Tensors]:
        scale = reference_amax(weight, "block") / 448
        codes = reference_codes(weight, scale, (128, 128))
        values = codes.float() * expanded(scale, (128, 128), codes)
        return values, {name: codes, f"{name}_scale_inv": scale}

    source = tmp_path / "fp8"
    exact = quantized_source(source, model_folder("llama", shard_size="1GB", hidden_size=200), by_blocks)
    edit_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    make(source, recipe(fp8_source="requantize", ignore=["re:.*down_proj"]), tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    for name, weight in exact.items():
        if "down_proj" in name:
            assert torch.equal(made[name], weight.bfloat16())
            continue
        scale = reference_amax(weight, "channel") / 448
        assert torch.equal(made[f"{name}_scale"], scale)
        assert same_bytes(made[name], reference_codes(weight, scale))


@pytest.mark.parametrize("unit", ["tensor []", "tensor [1]", "row [out]", "row [out, 1]"])
def test_scales_per_tensor_or_row_are_dequantized_and_the_weights_quantized_again(
    model_folder: Models, tmp_path: Path, unit: str
) -> None:
    def by_unit(name: str, weight: Tensor) -> tuple[Tensor, Tensors]:
        scale = reference_amax(weight, "tensor" if unit.startswith("tensor") else "channel") / 448
        codes = reference_codes(weight, scale)
        shapes = {"tensor []": (), "tensor [1]": (1,), "row [out]": (-1,), "row [out, 1]": (-1, 1)}
        spent = {f"{name.removesuffix('.weight')}.input_scale": torch.ones(())}
        return codes.float() * scale, spent | {name: codes, f"{name}_scale": scale.reshape(shapes[unit])}

    source = tmp_path / "fp8"
    exact = quantized_source(source, model_folder("llama", shard_size="1GB"), by_unit)
    edit_config(source, quantization_config={"quant_method": "fp8", "activation_scheme": "static"})
    make(source, recipe(fp8_source="requantize"), tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    assert not any(name.endswith("input_scale") for name in made)
    for name, weight in exact.items():
        scale = reference_amax(weight, "channel") / 448
        assert torch.equal(made[f"{name}_scale"], scale)
        assert same_bytes(made[name], reference_codes(weight, scale))
