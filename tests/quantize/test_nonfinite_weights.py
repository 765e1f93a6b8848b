"""NaN and Inf stop a run: the tensor and the index are named, and no model is left."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from support.quantizing import SCHEMES, Models, edit_config, edit_tensors, make, tensors_of
from support.tiny_models import recipe
from torch import Tensor

from fp8pipe.errors import NonFiniteWeight
from fp8pipe.quantize.engine import kept


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", ["channel", "tensor", "block"])
def test_a_nonfinite_weight_is_named_with_its_index_and_leaves_no_model(
    model_folder: Models, tmp_path: Path, bad: float, scheme: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama", shard_size="1GB", head_dim=64, intermediate_size=384), source)
    edit_tensors(source, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][301, 17].fill_(bad))
    with pytest.raises(NonFiniteWeight, match=rf"layers\.1\.mlp\.up_proj\.weight\[301, 17\] is {bad}"):
        make(source, recipe(**SCHEMES[scheme]), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


KEPT = {
    "model.embed_tokens.weight": (95, 63),
    "lm_head.weight": (0, 1),
    "model.norm.weight": (7,),
    "model.layers.1.mlp.down_proj.weight": (3, 100),
}


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("stripe", [1000, 4 << 20])
@pytest.mark.parametrize("name", KEPT)
def test_a_nonfinite_kept_weight_is_named_with_its_index_and_leaves_no_model(
    model_folder: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stripe: int, bad: float
) -> None:
    monkeypatch.setattr(kept, "STRIPE_BYTES", stripe)
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama", shard_size="1GB"), source)
    edit_tensors(source, lambda tensors: tensors[name][KEPT[name]].fill_(bad))
    with pytest.raises(NonFiniteWeight, match=re.escape(f"{name}{list(KEPT[name])} is {bad}")):
        make(source, recipe(ignore=["re:.*layers.1.mlp"]), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_kept_experts_must_be_finite_but_buffers_need_not(model_folder: Models, tmp_path: Path) -> None:
    source, mask = tmp_path / "source", "model.layers.0.self_attn.masked_bias"
    experts = "model.layers.1.mlp.experts.gate_up_proj"
    shutil.copytree(model_folder("gpt-oss", shard_size="1GB"), source)
    edit_tensors(source, lambda tensors: tensors.update({mask: torch.full((4,), -math.inf)}))
    make(source, recipe(), tmp_path / "masked")
    assert bool(tensors_of(tmp_path / "masked")[mask].isneginf().all())
    edit_tensors(source, lambda tensors: tensors[experts][2, 5, 7].fill_(math.inf))
    with pytest.raises(NonFiniteWeight, match=re.escape(f"{experts}[2, 5, 7] is inf")):
        make(source, recipe(), tmp_path / "out")


def test_a_nonfinite_kept_weight_of_an_fp8_source_is_named(model_folder: Models, tmp_path: Path) -> None:
    source, name = tmp_path / "fp8", "model.layers.0.mlp.down_proj.weight"
    shutil.copytree(model_folder("llama", shard_size="1GB"), source)

    def as_fp8(tensors: dict[str, Tensor]) -> None:
        codes = torch.zeros(tensors[name].shape).to(torch.float8_e4m3fn)
        codes.view(torch.uint8)[11, 13] = 0x7F
        tensors |= {name: codes, f"{name}_scale": torch.ones(())}

    edit_tensors(source, as_fp8)
    edit_config(source, quantization_config={"quant_method": "fp8"})
    with pytest.raises(NonFiniteWeight, match=re.escape(f"{name}[11, 13] is nan")):
        make(source, recipe(fp8_source="requantize", ignore=["re:.*down_proj"]), tmp_path / "out")


def test_all_zero_scale_units_are_recorded(model_folder: Models, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama", shard_size="1GB"), source)

    def zero(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][3] = 0
        tensors["model.layers.1.self_attn.o_proj.weight"][:] = 0

    edit_tensors(source, zero)
    _, checkpoint = make(source, recipe(), tmp_path / "out")
    assert checkpoint.zero_units == (
        "model.layers.0.mlp.down_proj.weight[3]",
        "model.layers.1.self_attn.o_proj.weight",
    )
