"""The validator's compiled loop: what it keeps of a weight is what torch, and float64, say of it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from fp8pipe.model.headers import TensorInfo
from fp8pipe.validate import compare
from fp8pipe.validate.compare import KINDS, Comparison
from fp8pipe.validate.scheme import FP8, MXFP8, Spec

SPECS = {
    "tensor": Spec(FP8, "tensor", None, None),
    "channel": Spec(FP8, "channel", None, None),
    "block": Spec(FP8, "block", (16, 48), None),
    "group": Spec(MXFP8, "group", (1, 32), None),
}
SHAPE = (70, 300)
"""Neither whole blocks nor whole runs of columns; in three tiles."""
TILES = (0, 32, 64, 70)
EXACT = (
    *("amax", "most_clipped", "worst_unit", "unequal", "off", "first_off", "not_nearest", "far", "zero_codes"),
    *("zero_source", "bad_ratio", "inexact", "foreign_scales", "units"),
)
NEAR = ("error_sq", "source_sq", "worst_cosine")


def scales_of(weight: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Absmax scales of each unit, by loops."""
    grid = torch.zeros(spec.units(SHAPE))
    high, wide = spec.block or ((1, SHAPE[1]) if spec.strategy == "channel" else SHAPE)
    for index in np.ndindex(tuple(grid.view(-1, grid.shape[-1]).shape)):
        part = weight[index[0] * high : (index[0] + 1) * high, index[1] * wide : (index[1] + 1) * wide].float()
        grid.view(-1, grid.shape[-1])[index] = max(float(part.abs().max()), 1e-12) / 448
    return torch.exp2(torch.ceil(torch.log2(grid))) if spec.format is MXFP8 else grid


def spread(scale: torch.Tensor, spec: Spec) -> torch.Tensor:
    high, wide = spec.block or ((1, SHAPE[1]) if spec.strategy == "channel" else SHAPE)
    grid = scale.view(-1, scale.shape[-1])
    return grid.repeat_interleave(high, 0)[: SHAPE[0]].repeat_interleave(wide, 1)[:, : SHAPE[1]]


def compared(codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, spec: Spec) -> Comparison:
    dtype = next(name for name, kind in KINDS.items() if kind == weight.dtype)
    entry = TensorInfo("w", "F8_E4M3", SHAPE, "model.safetensors", 0, codes.numel())
    comparison = Comparison(entry, dtype, spec, SHAPE)
    high = spec.block[0] if spec.block else 1
    for begin, end in pairwise(TILES):
        rows = slice(None) if spec.strategy == "tensor" else slice(begin // high, -(-end // high))
        comparison.add(begin, codes[begin:end], weight[begin:end].view(torch.uint8).reshape(-1).numpy(), scale[rows])
    return comparison.finish(scale)


def weights(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Ordinary values, with zeros of both signs, and values far below and above the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SHAPE, generator=generator) * 0.02
    weight[torch.rand(SHAPE, generator=generator) < 0.05] *= 1e-4
    weight[torch.rand(SHAPE, generator=generator) < 0.02] = 0
    weight[5, 7], weight[6] = -0.0, 0
    weight[40, 100:110] *= 30
    return weight.to(dtype)


@pytest.mark.parametrize("damage", ["none", "flips", "noise", "small scales", "large scales", "not numbers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("strategy", list(SPECS))
def test_compiled_loop_keeps_what_torch_keeps(
    strategy: str, dtype: torch.dtype, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, weight, generator = SPECS[strategy], weights(dtype, 1), torch.Generator().manual_seed(2)
    scale = scales_of(weight, spec)
    if damage.endswith("scales"):
        scale *= 0.25 if damage == "small scales" else 64
    codes = (weight.float() / spread(scale, spec)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    if damage == "flips":
        flips = torch.rand(SHAPE, generator=generator) < 0.01
        codes ^= (flips << torch.randint(0, 8, SHAPE, generator=generator)).to(torch.uint8)
    if damage == "noise":
        codes = torch.randint(0, 256, SHAPE, generator=generator, dtype=torch.uint8)
    if damage == "not numbers":
        weight[3, 5], weight[33, 299], weight[64, 0], codes[50, 50] = torch.nan, torch.inf, -torch.inf, 0x7F
    ours = compared(codes, weight, scale, spec)
    monkeypatch.setattr(compare, "is_compiled", lambda spec: False)
    theirs = compared(codes, weight, scale, spec)
    for name in EXACT:
        assert repr(getattr(ours, name)) == repr(getattr(theirs, name)), name
    for name in NEAR:
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-5, abs=1e-6, nan_ok=True), name
    assert (ours.worst_row == theirs.worst_row) or ours.worst_cosine == pytest.approx(theirs.worst_cosine, abs=1e-6)
    assert bool(ours.unequal) is (damage in ("flips", "noise", "not numbers"))


@pytest.mark.parametrize("strategy", list(SPECS))
def test_norms_are_those_of_float64(strategy: str) -> None:
    spec, weight = SPECS[strategy], weights(torch.bfloat16, 3)
    scale = scales_of(weight, spec)
    multiplier = spread(scale, spec)
    codes = (weight.float() / multiplier).to(torch.float8_e4m3fn)
    restored = codes.double() * multiplier.double()
    found = compared(codes.view(torch.uint8), weight, scale, spec)
    assert found.source_sq == pytest.approx(float((weight.double() ** 2).sum()), rel=1e-6)
    assert found.error_sq == pytest.approx(float(((weight.double() - restored) ** 2).sum()), rel=1e-5)


def test_every_number_rounds_as_torch_rounds_it() -> None:
    """All bf16 numbers, and float32 numbers on and beside every tie of E4M3."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    finite = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (finite[1:] + finite[:-1]) / 2
    beside = torch.cat([ties, torch.nextafter(ties, ties - 1), torch.nextafter(ties, ties + 1), finite])
    numbers = torch.cat([(bits << 16).view(torch.float32), beside, -beside])
    numbers = torch.cat([numbers, torch.zeros(-len(numbers) % 300)]).view(-1, 300)
    wanted = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    is_number = ~torch.isnan(numbers)
    codes = torch.where(is_number, wanted, 0x7F)
    entry = TensorInfo("w", "F8_E4M3", tuple(numbers.shape), "model.safetensors", 0, codes.numel())
    found = Comparison(entry, "F32", Spec(FP8, "tensor", None, None), (len(numbers), 300))
    found.add(0, codes, numbers.view(torch.uint8).reshape(-1).numpy(), torch.ones(1))
    signed_nan = torch.isnan(numbers) & torch.signbit(numbers)
    assert found.unequal == int(signed_nan.sum())
