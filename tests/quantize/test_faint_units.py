"""Units of weights so small that all their codes are zero: stored as zeros with a scale of 1, recorded, and sound."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.findings import ids
from support.quantizing import edit_tensors, make, tensors_of
from support.tiny_models import architecture_of, recipe
from torch import Tensor

from fp8pipe.hub.source import resolve
from fp8pipe.quantize.engine.journal import open_journal
from fp8pipe.records import ValidationReport
from fp8pipe.validate import validate

Models = Callable[..., Path]

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "channel": ("fp8-dynamic", {}),
    "block": ("fp8-block", {"weights": {"strategy": "block", "block_shape": (32, 32)}}),
    "block-divided": ("fp8-block", {"weights": {"strategy": "block", "block_shape": (32, 32), "scales": "exact"}}),
    "tensor": ("autofp8-dynamic", {}),
    "tensor-apart": ("autofp8-dynamic", {"weights": {"strategy": "tensor", "share_scales": False}}),
    "channel-mse": ("fp8-dynamic", {"weights": {"strategy": "channel", "observer": "mse"}}),
    "tensor-mse": ("autofp8-dynamic", {"weights": {"strategy": "tensor", "observer": "mse"}}),
}
TINY = [0.0, 1e-40, 1e-21, 2e-18, 1e-16, 3e-13]
"""Zeros, bf16 denormals, no code but zero, and ranges below the floor of 1e-12 that leave some codes."""
EXPERT = "model.layers.1.mlp.experts.2"


def judged(folder: Path, source: Path) -> list[ValidationReport]:
    with_source = validate(folder, source=resolve(str(source)), architecture=architecture_of(source))
    return [with_source, validate(folder)]


def shrink(weight: Tensor, amax: float) -> None:
    """Scale a part of a weight so that its largest magnitude is `amax`, or as near as bf16 comes."""
    exact = weight.double()
    weight.copy_((exact / exact.abs().max() * amax).to(weight.dtype))


@pytest.fixture
def source_with(model_folder: Models, tmp_path: Path) -> Callable[..., Path]:
    def build(model: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
        source = shutil.copytree(model_folder(model, shard_size="1GB"), tmp_path / "source")
        edit_tensors(source, change)
        return source

    return build


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tiny_weights_end_in_a_sound_checkpoint(source_with: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    """Whole experts, one weight of a fused group, and some rows and columns of an otherwise normal matrix."""
    experts = {f"model.layers.{index // 4}.mlp.experts.{index % 4}": amax for index, amax in enumerate(TINY)}

    def change(tensors: dict[str, Tensor]) -> None:
        for expert, amax in experts.items():
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                shrink(tensors[f"{expert}.{leaf}.weight"], amax)
        shrink(tensors["model.layers.1.mlp.experts.3.gate_proj.weight"], 1e-21)
        shrink(tensors["model.layers.0.self_attn.k_proj.weight"], 1e-30)
        shrink(tensors["model.layers.1.self_attn.v_proj.weight"], 1e-15)
        for row, amax in enumerate(TINY):
            shrink(tensors["model.layers.0.self_attn.q_proj.weight"][row], amax)
            shrink(tensors["model.layers.1.self_attn.o_proj.weight"][32:64, 20 * row : 20 * row + 20], amax)
        shrink(tensors["model.layers.0.self_attn.o_proj.weight"][32:64, 32:64], 1e-21)

    source = source_with("qwen3-moe", change)
    name, changes = SCHEMES[scheme]
    _, checkpoint = make(source, recipe(name, **changes), tmp_path / "fp8")
    true = {"C9", "K10"} | ({"V9"} if scheme == "tensor-apart" else set())
    for report in judged(tmp_path / "fp8", source):
        assert ids(report) <= true, [finding.sentence() for finding in report.findings]
        assert report.sound
    stored = tensors_of(tmp_path / "fp8")
    for expert, amax in experts.items():
        codes = stored[f"{expert}.down_proj.weight"].view(torch.uint8) & 0x7F
        (scale,) = (tensor for key, tensor in stored.items() if key.startswith(f"{expert}.down_proj.weight_scale"))
        assert bool(codes.any()) == (amax > 2.1e-18)
        assert bool((scale == 1).all()) == (amax < 2.1e-18)
        assert any(unit.startswith(f"{expert}.down_proj") for unit in checkpoint.faint_units) == (0 < amax < 2.1e-18)
        assert amax or f"{expert}.down_proj.weight" in checkpoint.zero_units


def test_a_tiny_sibling_does_not_raise_the_scale_that_vllm_takes_for_a_group(
    source_with: Callable[..., Path], tmp_path: Path
) -> None:
    """Per-tensor scales that are not shared: vLLM requantizes the group to the largest."""
    source = source_with("llama", lambda tensors: tensors["model.layers.0.self_attn.k_proj.weight"].mul_(1e-30))
    name, changes = SCHEMES["tensor-apart"]
    make(source, recipe(name, **changes), tmp_path / "fp8")
    stored = tensors_of(tmp_path / "fp8")
    scales = {leaf: float(stored[f"model.layers.0.self_attn.{leaf}_proj.weight_scale"]) for leaf in "qkv"}
    assert scales["k"] < min(scales["q"], scales["v"]) < 1


def test_a_resumed_run_records_the_same_units(source_with: Callable[..., Path], tmp_path: Path) -> None:
    """The journal holds the range of a fused group, and that of each of its members."""
    path = tmp_path / "journal"
    first = open_journal(path, "run", files=(), is_safe=lambda name: True)
    first.add_range("group", 0.5, [0.5, 1e-30])
    first.add_finished("a", ["a[1]"], ["a[2]"])
    first.close()
    again = open_journal(path, "run", files=(), is_safe=lambda name: True)
    assert again.ranges == {"group": (0.5, [0.5, 1e-30])}
    assert (again.zero_units, again.faint_units) == (["a[1]"], ["a[2]"])
    again.close()


@pytest.mark.parametrize("scheme", ["channel", "block", "tensor"])
def test_zeros_for_weights_that_have_codes_stay_an_error(
    source_with: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:
    """Each weight is zeroed in turn, under its own scale and under a scale of 1."""
    alone = [
        f"model.layers.{layer}.{leaf}.weight" for layer in (0, 1) for leaf in ("self_attn.o_proj", "mlp.down_proj")
    ]
    ranges = dict(zip(alone, (1e-3, 1e-11, 5e-13, 1e-13), strict=True))
    source = source_with("llama", lambda tensors: [shrink(tensors[name], amax) for name, amax in ranges.items()])
    name, changes = SCHEMES[scheme]
    folder = tmp_path / "fp8"
    make(source, recipe(name, **changes), folder)
    sound = tensors_of(folder)
    for name in alone:
        (scale,) = (key for key in sound if key.startswith(f"{name}_scale"))
        zeros = torch.zeros_like(sound[name].float()).to(torch.float8_e4m3fn)
        for spoiled in ({name: zeros}, {name: zeros, scale: torch.ones_like(sound[scale])}):
            edit_tensors(folder, lambda tensors, to=spoiled: tensors.update(sound | to))
            report, _ = judged(folder, source)
            found = {finding.check for finding in report.errors if finding.tensor in (name, scale)}
            assert found & {"V5", "D1", "D6"}, [finding.sentence() for finding in report.findings]
