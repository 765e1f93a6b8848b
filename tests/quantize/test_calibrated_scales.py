"""Scales of inputs and KV caches are the calibrated ranges over 448; an unusable range is an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizing import Models, tensors_of
from support.tiny_models import architecture_of, calibration_for, plan_of, recipe

from fp8pipe.errors import InputError
from fp8pipe.hub.source import resolve
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import Plan
from fp8pipe.records.calibration import KVRange
from fp8pipe.validate import validate


def test_scales_are_amax_over_448_and_shared_in_fused_groups(model_folder: Models, tmp_path: Path) -> None:
    source = model_folder("llama")
    plan = plan_of(source, recipe("fp8-static-kv", kv_cache={"strategy": "head"}))
    calibration = calibration_for(plan)
    quantize(resolve(str(source)), plan, tmp_path, calibration=calibration)
    made = tensors_of(tmp_path)
    layer = "model.layers.1"
    joint = max(calibration.inputs[f"{layer}.self_attn.{leaf}_proj"] for leaf in "qkv")
    for leaf in "qkv":
        scale = made[f"{layer}.self_attn.{leaf}_proj.input_scale"]
        assert torch.equal(scale, (torch.tensor([joint]) / 448))
    own = calibration.inputs[f"{layer}.mlp.down_proj"]
    assert torch.equal(made[f"{layer}.mlp.down_proj.input_scale"], torch.tensor([own]) / 448)
    assert torch.equal(made[f"{layer}.self_attn.k_scale"], torch.tensor([2.0, 3.0]).view(2, 1, 1) / 448)
    assert torch.equal(made[f"{layer}.self_attn.v_scale"], torch.tensor([3.0, 4.0]).view(2, 1, 1) / 448)
    assert (tmp_path / "fp8pipe" / "calibration.json").exists()


def test_a_layer_that_reads_anothers_cache_has_that_layers_scales(model_folder: Models, tmp_path: Path) -> None:
    source = model_folder("gemma4-shared")
    plan = plan_of(source, recipe("fp8-static-kv", kv_cache={"strategy": "head"}))
    assert plan.calibrated_attention() == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    calibration = calibration_for(plan)
    ranges = {name: KVRange(k_amax=(2.0 + i, 3.0), v_amax=(4.0 + i, 5.0)) for i, name in enumerate(calibration.kv)}
    quantize(resolve(str(source)), plan, tmp_path, calibration=calibration.model_copy(update={"kv": ranges}))
    made = tensors_of(tmp_path)
    for leaf in ("k_scale", "v_scale"):
        scales = [made[f"model.layers.{layer}.self_attn.{leaf}"] for layer in range(4)]
        assert torch.equal(scales[2], scales[0])
        assert torch.equal(scales[3], scales[1])
        assert not torch.equal(scales[0], scales[1])
    assert validate(tmp_path, source=resolve(str(source)), architecture=architecture_of(source)).sound


def with_input(value: float | None) -> Callable[[Plan], Any]:
    """A calibration in which one input range is `value`, or missing."""

    def calibration(plan: Plan) -> Any:
        ranges = calibration_for(plan)
        inputs = dict(ranges.inputs)
        name = "model.layers.0.mlp.up_proj"
        del inputs[name]
        return ranges.model_copy(update={"inputs": inputs | ({} if value is None else {name: value})})

    return calibration


def with_k_amax(k_amax: tuple[float, ...]) -> Callable[[Plan], Any]:
    """A calibration in which the key ranges of one layer are `k_amax`."""

    def calibration(plan: Plan) -> Any:
        ranges = calibration_for(plan)
        kv = ranges.kv | {"model.layers.0.self_attn": KVRange(k_amax=k_amax, v_amax=(1.0,))}
        return ranges.model_copy(update={"kv": kv})

    return calibration


UNUSABLE: dict[str, Callable[[Plan], Any]] = {
    "no calibration": lambda plan: None,
    "no range": with_input(None),
    "NaN": with_input(math.nan),
    "infinite": with_input(math.inf),
    "negative": with_input(-1.0),
    "no key range": with_k_amax(()),
    "NaN key range": with_k_amax((math.nan,)),
    "two ranges for one scale": with_k_amax((1.0, 2.0)),
    "another source": lambda plan: calibration_for(plan, source_commit="another"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_missing_or_unusable_range_is_an_error_and_nothing_is_written(
    model_folder: Models, tmp_path: Path, case: str
) -> None:
    plan = plan_of(model_folder("llama"), recipe("fp8-static-kv"))
    snapshot = resolve(str(model_folder("llama")))
    with pytest.raises(InputError, match="calibrat"):
        quantize(snapshot, plan, tmp_path / "out", calibration=UNUSABLE[case](plan))
    assert not (tmp_path / "out").exists()
