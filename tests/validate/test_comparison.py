"""Comparing a weight with its source tile by tile gives what naive arithmetic on the whole matrix gives."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from fp8pipe.model.headers import TensorInfo
from fp8pipe.validate.meaning.formats import FP8, MXFP4, MXFP8, Spec
from fp8pipe.validate.measured import Comparison
from fp8pipe.validate.measuring.compare import KINDS, Comparer

SPECS = {
    "tensor": Spec(FP8, "tensor", None, None),
    "channel": Spec(FP8, "channel", None, None),
    "block": Spec(FP8, "block", (16, 48), None),
    "group": Spec(MXFP8, "group", (1, 32), None),
    "four bits": Spec(MXFP4, "group", (1, 32), None),
}
SHAPE = (70, 300)
"""Neither whole blocks nor whole runs of columns; in three tiles."""
TILES = (0, 32, 64, 70)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
ENTRY = TensorInfo("w", "F8_E4M3", SHAPE, "model.safetensors", 0, 0)


def unit_of(spec: Spec) -> tuple[int, int]:
    """Rows and columns under one scale."""
    return spec.block or ((1, SHAPE[1]) if spec.strategy == "channel" else SHAPE)


def amax_of(weight: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Largest magnitude of each unit, in the shape of its scale, by loops."""
    grid, (high, wide) = torch.zeros(spec.units(SHAPE)), unit_of(spec)
    flat = grid.view(-1, grid.shape[-1])
    for row, column in np.ndindex(tuple(flat.shape)):
        flat[row, column] = (
            weight[row * high : (row + 1) * high, column * wide : (column + 1) * wide].float().abs().max()
        )
    return grid


def scales_of(weight: torch.Tensor, spec: Spec) -> torch.Tensor:
    scale = amax_of(weight, spec).nan_to_num(1e-12, 1, 1).clamp(min=1e-12) / spec.format.codes.maximum
    return torch.exp2(torch.ceil(torch.log2(scale))) if spec.format in (MXFP8, MXFP4) else scale


def spread(scale: torch.Tensor, spec: Spec) -> torch.Tensor:
    """One value per weight."""
    high, wide = unit_of(spec)
    grid = scale.view(-1, scale.shape[-1])
    return grid.repeat_interleave(high, 0)[: SHAPE[0]].repeat_interleave(wide, 1)[:, : SHAPE[1]]


def nearest(scaled: torch.Tensor, spec: Spec) -> torch.Tensor:
    if spec.format is not MXFP4:
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    ties = (E2M1[1:] + E2M1[:-1]) / 2
    return (scaled.abs()[..., None] > ties).sum(-1).to(torch.uint8) | (torch.signbit(scaled).to(torch.uint8) << 3)


def values(codes: torch.Tensor, spec: Spec) -> torch.Tensor:
    if spec.format is not MXFP4:
        return codes.view(torch.float8_e4m3fn).double()
    return (E2M1[(codes & 7).int()] * torch.where(codes >= 8, -1, 1)).double()


def expected(codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, spec: Spec) -> dict[str, object]:
    """What a comparison must find, on whole matrices in float64."""
    kind, multiplier = spec.format.codes, spread(scale, spec)
    scaled = weight.float() / multiplier
    target, value, wanted = scaled.double(), values(codes, spec), nearest(scaled, spec)
    step = torch.exp2((torch.frexp(target).exponent - 1).clamp(min=kind.min_exponent).double() - kind.mantissa_bits)
    error, differs = (target - value).abs(), wanted != codes
    clipped = (target.abs() >= kind.maximum) & (value == target.sign() * kind.maximum)
    off = differs & ~((error <= step / 2 + target.abs() / 256) | clipped)
    surplus = error - (target - values(wanted, spec)).abs()
    sign = 8 if kind.per_byte == 2 else 0x80
    order = lambda codes: torch.where(codes >= sign, -1, 1) * (codes & (sign - 1)).int()  # noqa: E731
    beyond = scaled.abs() > kind.reach
    amax, restored = amax_of(weight, spec), value * multiplier.double()
    counts = (torch.stack([part.sum() for part in parts_of(beyond, spec)])).view(-1)
    first = torch.nonzero(off)
    at = tuple(first[0].tolist()) if len(first) else None
    return {
        "amax": float(amax.max()),
        "most_clipped": int(counts.max()) if spec.strategy != "group" else 0,
        "worst_unit": int(counts.argmax()) if spec.strategy != "group" else 0,
        "unequal": int(differs.sum()),
        "off": int(off.sum()),
        "first_off": (list(at), float(target[at]), float(value[at])) if at else None,
        "not_nearest": int((differs & (surplus > step / 1e4)).sum()),
        "far": int((differs & ((order(codes) - order(wanted)).abs() > 1)).sum()),
        "zero_codes": int(((codes & (sign - 1)) == 0).sum()),
        "zero_source": int((weight == 0).sum()),
        "error_sq": float((((target - value) * multiplier.double()) ** 2).sum(1).nan_to_num(posinf=0).sum()),
        "source_sq": float((weight.double() ** 2).sum(1).nan_to_num(posinf=0).sum()),
        "worst_cosine": float(cosines(weight.double(), restored).nan_to_num(1.0).min()),
    }


def cosines(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Of each row; rows of zeros are like each other and unlike all others."""
    left_is_zero, right_is_zero = ((side == 0).all(1) for side in (left, right))
    found = torch.nn.functional.cosine_similarity(left, right, dim=1)
    return torch.where(left_is_zero | right_is_zero, (left_is_zero & right_is_zero).double(), found)


def parts_of(flags: torch.Tensor, spec: Spec) -> list[torch.Tensor]:
    high, wide = unit_of(spec)
    return [part for band in flags.split(high) for part in band.split(wide, 1)]


def compared(codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, spec: Spec) -> Comparison:
    dtype = next(name for name, kind in KINDS.items() if kind == weight.dtype)
    comparer = Comparer(ENTRY, dtype, spec, SHAPE)
    high = spec.block[0] if spec.block else 1
    for begin, end in pairwise(TILES):
        rows = slice(None) if spec.strategy == "tensor" else slice(begin // high, -(-end // high))
        comparer.add(begin, codes[begin:end], weight[begin:end].view(torch.uint8).reshape(-1).numpy(), scale[rows])
    return comparer.finish(scale)


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
def test_comparison_by_tiles_finds_what_naive_arithmetic_finds(strategy: str, dtype: torch.dtype, damage: str) -> None:
    spec, weight, generator = SPECS[strategy], weights(dtype, 1), torch.Generator().manual_seed(2)
    bits = 8 // spec.format.codes.per_byte
    scale = scales_of(weight, spec)
    if damage.endswith("scales"):
        scale *= 0.25 if damage == "small scales" else 64
    codes = nearest(weight.float() / spread(scale, spec), spec)
    if damage == "flips":
        flips = torch.rand(SHAPE, generator=generator) < 0.01
        codes ^= (flips << torch.randint(0, bits, SHAPE, generator=generator)).to(torch.uint8)
    if damage == "noise":
        codes = torch.randint(0, 1 << bits, SHAPE, generator=generator, dtype=torch.uint8)
    if damage == "not numbers":
        weight[3, 5], weight[33, 299], weight[64, 0], codes[50, 50] = torch.nan, torch.inf, -torch.inf, (1 << bits) - 1
    found, wanted = compared(codes, weight, scale, spec), expected(codes, weight, scale, spec)
    if damage == "not numbers":  # rows with them have no norms
        wanted = {name: value for name, value in wanted.items() if not isinstance(value, float)}
    for name, value in wanted.items():
        if isinstance(value, float) and name != "amax":
            assert getattr(found, name) == pytest.approx(value, rel=1e-5, abs=1e-6), name
        else:
            assert repr(getattr(found, name)) == repr(value), name  # NaN is like NaN
    assert bool(found.unequal) is (damage in ("flips", "noise", "not numbers"))


@pytest.mark.parametrize("factor", [1, 0.25, 64])
@pytest.mark.parametrize("strategy", ["channel", "block", "group", "four bits"])
def test_scales_are_held_to_the_largest_weight_of_their_unit(strategy: str, factor: float) -> None:
    spec, weight = SPECS[strategy], weights(torch.bfloat16, 3)
    scale = scales_of(weight, spec)
    scale.view(-1)[7] *= factor
    codes = nearest(weight.float() / spread(scale, spec), spec)
    found = compared(codes, weight, scale, spec)
    assert (found.bad_ratio.count, found.bad_ratio.first) == ((0, -1) if factor == 1 else (1, 7))
    if spec.format is FP8:
        assert found.inexact["divided"].count == found.foreign_scales == (factor != 1)


def test_scale_of_a_weight_with_one_row_is_held_to_it_too() -> None:
    spec, weight = Spec(FP8, "channel", None, None), torch.rand(1, 64)
    comparer = Comparer(ENTRY, "F32", spec, (1, 64))
    scale = weight.max().reshape(1, 1) / 448 * 3
    codes = (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8)
    comparer.add(0, codes, weight.view(torch.uint8).reshape(-1).numpy(), scale)
    assert comparer.finish(scale).bad_ratio.count == 1


def test_every_number_rounds_as_torch_rounds_it() -> None:
    """All bf16 numbers, and float32 numbers on and beside every tie of E4M3."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    finite = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (finite[1:] + finite[:-1]) / 2
    beside = torch.cat([ties, torch.nextafter(ties, ties - 1), torch.nextafter(ties, ties + 1), finite])
    numbers = torch.cat([(bits << 16).view(torch.float32), beside, -beside])
    numbers = torch.cat([numbers, torch.zeros(-len(numbers) % 300)]).view(-1, 300)
    wanted = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(torch.isnan(numbers), 0x7F, wanted)
    comparer = Comparer(ENTRY, "F32", Spec(FP8, "tensor", None, None), (len(numbers), 300))
    comparer.add(0, codes, numbers.view(torch.uint8).reshape(-1).numpy(), torch.ones(1))
    signed_nan = torch.isnan(numbers) & torch.signbit(numbers)
    assert comparer.finish(None).unequal == int(signed_nan.sum())
