"""The arithmetic equals a reference without tiles: plain float32, one expression per formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import DATA
from support.numerics import expanded, reference_amax, reference_codes, reference_scale
from torch import Tensor

from fp8pipe.quantize import numerics
from fp8pipe.quantize.numerics import observers

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 5), (64, 160), (129, 257), (1000, 300), (5, 300_000)]
"""Not multiples of 128, wider than a tile, taller than a tile."""


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def measured(weight: Tensor, strategy: str) -> Tensor:
    if strategy == "tensor":
        return numerics.tensor_amax(weight)
    return numerics.channel_amax(weight) if strategy == "channel" else numerics.block_amax(weight, (128, 128))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_scales_and_codes_equal_the_reference_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype, strategy: str
) -> None:
    weight = random_weight(shape, dtype)
    amax = measured(weight, strategy)
    assert torch.equal(amax, reference_amax(weight, strategy))
    scale = numerics.weight_scale(amax)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, torch.clamp(amax, min=1e-12) / 448)

    block = (128, 128) if strategy == "block" else None
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn)
    numerics.encode(weight, scale, codes, block=block)
    assert torch.equal(codes.view(torch.uint8), reference_codes(weight, scale, block).view(torch.uint8))


@pytest.mark.parametrize("tile", [64, 100, 4096, 1 << 20])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_tile_size_changes_no_bit(tile: int, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight((300, 520))
    block = (128, 128) if strategy == "block" else None

    def run() -> tuple[Tensor, Tensor, Tensor]:
        amax = measured(weight, strategy)
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        numerics.encode(weight, numerics.weight_scale(amax), codes, block=block)
        rows = amax if strategy == "channel" else numerics.tensor_amax(weight)
        return amax, codes.view(torch.uint8), numerics.shrink_errors(weight, rows)

    expected = run()
    monkeypatch.setattr(observers, "TILE_ELEMENTS", tile)
    for found, wanted in zip(run(), expected, strict=True):
        assert torch.equal(found, wanted)


@settings(max_examples=60, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(2**-100, 2**100, width=32))
def test_any_value_under_any_scale_rounds_to_the_nearest_code(value: float, scale: float) -> None:
    weight = torch.tensor([[value]], dtype=torch.float32)
    codes = torch.empty((1, 1), dtype=torch.float8_e4m3fn)
    numerics.encode(weight, torch.tensor([scale]), codes)
    all_codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    finite = all_codes[~all_codes.isnan()]
    exact = (torch.tensor(value) / torch.tensor(scale)).double().clamp(-448, 448)
    assert (codes.double() - exact).abs().item() == (finite - exact).abs().min().item()


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 2.0**127, width=32))
def test_a_power_of_two_scale_is_the_least_that_reaches_the_range(amax: float) -> None:
    exact = numerics.weight_scale(torch.tensor([amax]))
    scale = numerics.weight_scale(torch.tensor([amax]), power_of_two=True)
    assert scale.dtype == torch.float32
    assert math.frexp(scale.item())[0] == 0.5
    assert scale.item() / 2 < exact.item() <= scale.item()


def test_a_range_of_448_times_a_power_of_two_keeps_its_scale() -> None:
    ranges = 448 * torch.exp2(torch.arange(-40, 40).float())
    assert torch.equal(numerics.weight_scale(ranges, power_of_two=True), ranges / 448)
    above = torch.nextafter(ranges / 448, torch.tensor(torch.inf)) * 448
    assert torch.equal(numerics.weight_scale(above, power_of_two=True), 2 * ranges / 448)


def test_mse_tries_only_powers_of_two_where_scales_are() -> None:
    weight = random_weight((256, 256))
    weight[0, 0] = 448 * 2.0**-8 * 1.1  # its own power of two is 2^-7; 0.8 of it fits 2^-8
    amax = numerics.block_amax(weight, (128, 128))
    per_row = amax.repeat_interleave(128, 0)
    found = numerics.shrink_errors(weight, per_row, columns=128, power_of_two=True)
    for shrink, errors in zip(numerics.SHRINKS, found, strict=True):
        scale = expanded(reference_scale(amax * torch.tensor(shrink), "power_of_two"), (128, 128), weight)
        squares = (reference_codes(weight, scale).float() * scale - weight.float()).double().square()
        wanted = torch.stack([run.sum(1) for run in squares.split(128, 1)], 1)
        torch.testing.assert_close(errors, wanted, rtol=1e-14, atol=0)


def test_all_zero_rows_get_a_usable_scale_and_zero_codes() -> None:
    weight = torch.zeros((4, 8), dtype=torch.bfloat16)
    scale = numerics.weight_scale(numerics.channel_amax(weight))
    assert torch.equal(scale, torch.full((4, 1), 1e-12) / 448)
    codes = torch.ones((4, 8)).to(torch.float8_e4m3fn)
    numerics.encode(weight, scale, codes)
    assert not codes.view(torch.uint8).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_a_nonfinite_weight_makes_amax_nonfinite_and_is_found(dtype: torch.dtype, bad: float, strategy: str) -> None:
    weight = random_weight((300, 700), dtype)
    weight[200, 650] = bad
    amax = measured(weight, strategy)
    assert int((~torch.isfinite(amax)).sum()) == 1
    assert numerics.first_nonfinite(weight) == (200, 650)
    assert numerics.first_nonfinite(random_weight((3, 3), dtype)) is None


def test_fp8_error_stays_within_half_a_step() -> None:
    weight = random_weight((256, 256), torch.float32)
    for strategy, block in (("tensor", None), ("channel", None), ("block", (128, 128))):
        scale = numerics.weight_scale(measured(weight, strategy))
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        numerics.encode(weight, scale, codes, block=block)
        full = scale if block is None else numerics.expand_scale(scale, block, (256, 256))
        step = torch.exp2(torch.floor(torch.log2((weight / full).abs().clamp(min=2**-6)))) / 8 * full
        error = (numerics.dequantize(codes, scale, block=block) - weight).abs()
        assert bool((error <= step / 2 * (1 + 1e-6)).all())


# ---------------------------------------------------------------------------------------------- mse


def test_rounding_as_float32_gives_the_codes_of_the_conversion() -> None:
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    around = [torch.nextafter(halves, torch.tensor(0.0)), halves, torch.nextafter(halves, torch.tensor(448.0))]
    anywhere = torch.randint(0, 0x43E00000, (200_000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    values = torch.cat([codes, *around, anywhere.view(torch.float32)])
    rounded = observers.round_e4m3(values.clone(), torch.empty_like(values, dtype=torch.int32))
    assert torch.equal(rounded, values.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [None, 128])
def test_mse_errors_equal_the_formula_up_to_the_order_of_the_sum(dtype: torch.dtype, columns: int | None) -> None:
    weight = random_weight((130, 300), dtype)
    weight[3] = 0
    per_row = numerics.channel_amax(weight)
    if columns is not None:
        per_row = torch.cat([run.abs().amax(1, keepdim=True).float() for run in weight.split(columns, 1)], 1)
    found = numerics.shrink_errors(weight, per_row, columns=columns)
    for shrink, errors in zip(numerics.SHRINKS, found, strict=True):
        scale = numerics.weight_scale(per_row * shrink).repeat_interleave(columns or 300, 1)[:, :300]
        restored = reference_codes(weight, scale).float() * scale
        squares = (restored - weight.float()).double().square()
        wanted = torch.stack([run.sum(1) for run in squares.split(columns or 300, 1)], 1)
        torch.testing.assert_close(errors, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(64, 160), (130, 300)])
def test_mse_takes_the_shrink_with_the_least_squared_error(shape: tuple[int, int]) -> None:
    weight = random_weight(shape)
    weight[:, 0] *= 8  # an outlier in each row makes shrinking worthwhile
    amax = numerics.channel_amax(weight)
    chosen = numerics.best_amax(amax, numerics.shrink_errors(weight, amax))
    for row in range(shape[0]):
        errors = []
        for percent in range(100, 79, -1):
            scale = numerics.weight_scale(amax[row] * torch.tensor(percent / 100))
            restored = reference_codes(weight[row : row + 1], scale).float() * scale
            errors.append(float((restored - weight[row].float()).double().square().sum()))
        best = (100 - errors.index(min(errors))) / 100
        assert chosen[row].item() == pytest.approx(float(amax[row]) * best, rel=1e-6)
    assert bool((chosen < amax).any())


def test_mse_errors_of_a_row_do_not_depend_on_its_neighbours() -> None:
    weight = random_weight((200, 1000))
    amax = numerics.channel_amax(weight)
    together = numerics.shrink_errors(weight, amax)
    alone = torch.cat([numerics.shrink_errors(weight[i : i + 1], amax[i : i + 1]) for i in range(200)], dim=1)
    assert torch.equal(together, alone)


# ---------------------------------------------------------------------------------------------- the peer's rounding

PEER = load_file(DATA / "llmcompressor.safetensors")
"""Made by llm-compressor itself; see tests/data/make_llmcompressor.py."""


def peer_tensors(scheme: str) -> tuple[Tensor, Tensor, Tensor, tuple[int, int] | None]:
    """Source, codes as bytes, scales and block shape of llm-compressor's weight under `scheme`."""
    source, codes, scale = (PEER[f"{scheme}.{leaf}"] for leaf in ("source", "weight", "weight_scale"))
    return source, codes.view(torch.uint8), scale, (128, 128) if scheme == "FP8_BLOCK" else None


STRATEGIES = {"FP8_DYNAMIC": "channel", "FP8_BLOCK": "block", "per-tensor": "tensor"}


@pytest.mark.parametrize("scheme", STRATEGIES)
def test_llm_compressors_bytes_come_from_a_division_in_bf16(scheme: str) -> None:
    source, codes, scale, block = peer_tensors(scheme)
    assert scale.dtype == torch.bfloat16
    amax = reference_amax(source, STRATEGIES[scheme])
    assert torch.equal(scale.flatten(), (amax.bfloat16() / 448).flatten())
    full = scale if block is None else numerics.expand_scale(scale, block, (source.shape[0], source.shape[1]))
    divided = (source / full).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(divided.view(torch.uint8), codes)


@pytest.mark.parametrize("scheme", STRATEGIES)
def test_our_bytes_come_from_a_division_in_float32(scheme: str) -> None:
    source, codes, _, block = peer_tensors(scheme)
    scale = numerics.weight_scale(measured(source, STRATEGIES[scheme]))
    ours = torch.empty(source.shape, dtype=torch.float8_e4m3fn)
    numerics.encode(source, scale, ours, block=block)
    assert torch.equal(ours.view(torch.uint8), reference_codes(source, scale, block).view(torch.uint8))
    assert 0 < (ours.view(torch.uint8) != codes).float().mean().item() < 0.2


def test_both_agree_where_amax_is_448_times_a_power_of_two() -> None:
    source, codes, scale, _ = peer_tensors("FP8_DYNAMIC")
    ours = torch.empty(source.shape, dtype=torch.float8_e4m3fn)
    own_scale = numerics.weight_scale(numerics.channel_amax(source))
    numerics.encode(source, own_scale, ours)
    even = torch.frexp(own_scale[:, 0]).mantissa == 0.5
    assert int(even.sum()) >= 8
    assert torch.equal(own_scale[even], scale[even].float())
    assert torch.equal(ours.view(torch.uint8)[even], codes[even])
