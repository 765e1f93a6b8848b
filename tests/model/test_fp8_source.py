"""Reading an FP8 source: which scales belong to a weight, what each covers, and the weight's values."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.model.fp8_source import (
    ScaleGrid,
    as_block,
    dequantize,
    grid_of,
    holds_codes,
    scale_of,
    scale_values,
)
from fp8pipe.model.headers import TensorInfo

WEIGHT = (300, 200)
BLOCK = (128, 128)


@pytest.mark.parametrize(
    ("scale", "block", "expected"),
    [
        ((), None, ScaleGrid((1, 1), WEIGHT)),
        ((1,), BLOCK, ScaleGrid((1, 1), WEIGHT)),
        ((1, 1), None, ScaleGrid((1, 1), WEIGHT)),
        ((300,), None, ScaleGrid((300, 1), (1, 200))),
        ((300, 1), BLOCK, ScaleGrid((300, 1), (1, 200))),
        ((3, 2), BLOCK, ScaleGrid((3, 2), BLOCK)),
        ((3, 2), None, None),
        ((2, 3), BLOCK, None),
        ((200,), None, None),
    ],
)
def test_the_shape_of_scales_says_what_each_one_covers(
    scale: tuple[int, ...], block: tuple[int, int] | None, expected: ScaleGrid | None
) -> None:
    assert grid_of(WEIGHT, scale, block) == expected


@pytest.mark.parametrize("scale", [(), (300,), (3, 2)])
@pytest.mark.parametrize("rows", [(0, 300), (0, 1), (127, 257), (299, 300)])
def test_a_stripe_is_its_codes_times_their_scales(scale: tuple[int, ...], rows: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(WEIGHT, generator=generator).to(torch.float8_e4m3fn)
    values = torch.rand(scale, generator=generator) + 0.5
    grid = grid_of(WEIGHT, scale, BLOCK)
    assert grid is not None
    start, end = rows
    raw = bytearray(values.numpy().tobytes())
    found = dequantize(codes[start:end], scale_values(raw, "F32", grid), grid.unit, first_row=start)
    height, width = grid.unit
    for row in {start, (start + end) // 2, end - 1}:
        for column in (0, 127, 128, 199):
            expected = codes[row, column].float() * values.reshape(grid.shape)[row // height, column // width]
            assert found[row - start, column] == expected


@pytest.mark.parametrize(("dtype", "values"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_scales_of_any_float_become_float32(dtype: str, values: torch.dtype) -> None:
    scales = torch.tensor([0.5, 3.0], dtype=values)
    found = scale_values(bytearray(scales.view(torch.uint8).numpy().tobytes()), dtype, ScaleGrid((2, 1), (1, 8)))
    assert torch.equal(found, torch.tensor([[0.5], [3.0]]))


def info(name: str, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, dtype, (), "model.safetensors", 0, 0)


def test_the_inverse_scale_is_preferred_and_only_scales_of_the_weight_count() -> None:
    tensors = {name: info(name) for name in ("a.weight_scale", "a.weight_scale_inv", "b.weight_scale", "c.input_scale")}
    assert scale_of("a.weight", tensors) == tensors["a.weight_scale_inv"]
    assert scale_of("b.weight", tensors) == tensors["b.weight_scale"]
    assert scale_of("c.weight", tensors) is None


def test_codes_are_8_bit_floats_that_are_no_scales() -> None:
    assert holds_codes(info("a.weight", "F8_E4M3")) and holds_codes(info("a.weight", "F8_E5M2"))
    assert not holds_codes(info("a.weight_scale", "F8_E8M0")) and not holds_codes(info("a.weight", "BF16"))


@pytest.mark.parametrize("value", [None, [128], [128, 0], [128, True], "128", {"rows": 128}, [1.0, 2.0]])
def test_what_is_not_two_positive_sizes_is_no_block(value: object) -> None:
    assert as_block(value) is None
    assert as_block([64, 32]) == (64, 32)
