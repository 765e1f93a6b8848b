"""Arithmetic on codes and scale units: pure functions on small arrays, shared by the pass and its judges.

Shapes: codes uint8 [rows, columns]; a unit is what shares a scale, in a grid [1], [rows, 1] or [row blocks, column
blocks]. Magnitudes are compared as integers: without its sign bit any IEEE-like format orders as its bytes do, NaN on
top, so one AND and one max tell at once whether a unit is zero, saturated, infinite or not a number.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from fp8pipe.validate.meaning.formats import Codes, Spec
from fp8pipe.validate.measured import Array

FAINT = 1e-12
"""The least range that a scale of this engine covers. Of a unit below it, codes are few or none: they are held to the
last bit (D1, D6, D7), but no relative error is asked of them."""
FAINT_SCALES = (2.0**-49, 2.0**-48)
"""The scale of FAINT, 2.2e-15, lies between them, also when it is rounded up to a power of two. The engine writes none
that is smaller, and every other is larger."""
NOTHING = 2.0**-10
"""Half of the smallest E4M3 code above zero: source / scale up to it becomes zero."""

FLOAT_BITS: dict[str, tuple[torch.dtype, int, int]] = {
    "F8_E4M3": (torch.uint8, 0x7F, 0x7F),
    "F8_E5M2": (torch.uint8, 0x7F, 0x7C),
    "F16": (torch.int16, 0x7FFF, 0x7C00),
    "BF16": (torch.int16, 0x7FFF, 0x7F80),
    "F32": (torch.int32, 0x7FFF_FFFF, 0x7F80_0000),
    "F64": (torch.int64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}
"""Integer view, mask that drops the sign, and the first magnitude that is not a finite number."""


def unpack(data: Array, rows: int, codes: Codes) -> Array:
    """Stored bytes of whole rows -> codes [rows, columns]; the even column is in the low half of a byte."""
    stored = data.reshape(rows, -1)
    if codes.per_byte == 1:
        return stored
    both = np.empty((rows, 2 * stored.shape[1]), np.uint8)
    both[:, 0::2], both[:, 1::2] = stored & 15, stored >> 4
    return both


_E2M1_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_E2M1_EDGES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def values(codes: torch.Tensor, kind: Codes) -> torch.Tensor:
    """float32 values of codes."""
    if kind.per_byte == 2:
        return _E2M1_VALUES[codes.int()]
    return codes.view(torch.float8_e4m3fn).float()


def nearest(scaled: torch.Tensor, kind: Codes) -> torch.Tensor:
    """Codes that rounding gives, uint8. Ties of E2M1 go down: both neighbours are nearest there."""
    if kind.per_byte == 2:
        magnitude = torch.bucketize(scaled.abs(), _E2M1_EDGES).to(torch.uint8)
        return magnitude | (torch.signbit(scaled).to(torch.uint8) << 3)
    return scaled.clamp(-kind.maximum, kind.maximum).to(torch.float8_e4m3fn).view(torch.uint8)


def step(scaled: torch.Tensor, kind: Codes) -> torch.Tensor:
    """Distance between neighbouring codes at these values, float64."""
    exponent = torch.frexp(scaled).exponent.double() - 1
    return torch.exp2(exponent.clamp(min=kind.min_exponent) - kind.mantissa_bits)


def ordinal(codes: torch.Tensor, kind: Codes) -> torch.Tensor:
    """Codes numbered in the order of their values, both zeros alike."""
    sign = 8 if kind.per_byte == 2 else 0x80
    magnitude = (codes & (sign - 1)).to(torch.int16)
    return torch.where(codes >= sign, -magnitude, magnitude)


def top_value(magnitude: int, kind: Codes) -> float:
    """What a magnitude code stands for."""
    bits = kind.mantissa_bits
    exponent, mantissa = magnitude >> bits, magnitude & ((1 << bits) - 1)
    if exponent == 0:
        return math.ldexp(mantissa, kind.min_exponent - bits)
    return math.ldexp((1 << bits) + mantissa, kind.min_exponent + exponent - 1 - bits)


def magnitudes(tile: Array, dtype: str) -> torch.Tensor:
    """Bytes of a float tensor -> integer magnitudes, flat."""
    integer, mask, _ = FLOAT_BITS[dtype]
    return torch.from_numpy(tile).view(integer) & mask


def unit_tops(tile: torch.Tensor, spec: Spec) -> torch.Tensor:
    """Largest magnitude of each unit of whole bands of rows [rows, columns]."""
    if spec.strategy == "tensor":
        return tile.max().reshape(1)
    if spec.block is None:
        return tile.amax(1, keepdim=True)
    high, wide = spec.block
    if high > 1:
        tile = torch.stack([band.amax(0) for band in tile.split(high)])
    spare = -tile.shape[1] % wide
    if spare:
        tile = torch.nn.functional.pad(tile, (0, spare))
    return tile.view(len(tile), -1, wide).amax(2)


def unit_rows(spec: Spec, row: int, rows: int) -> slice:
    """The rows of the unit grid that belong to `rows` rows of the weight from `row` on."""
    if spec.strategy == "tensor":
        return slice(None)
    high = spec.block[0] if spec.block else 1
    return slice(row // high, -(-(row + rows) // high))


def scale_values(data: Array, dtype: str) -> torch.Tensor:
    """float32 values of stored scales, flat: floats, E4M3, or exponents (U8, 255 is NaN)."""
    tensor = torch.from_numpy(data)
    if dtype == "U8":
        return torch.where(tensor == 255, math.nan, torch.exp2(tensor.float() - 127))
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
    return tensor.view(kinds[dtype]).float()


def amax_of(tops: torch.Tensor, dtype: str) -> torch.Tensor:
    """Integer magnitudes of a source dtype -> their float32 values."""
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return tops.contiguous().view(kinds[dtype]).float()


def is_coarse(scale: torch.Tensor) -> torch.Tensor:
    """NVFP4 units whose scale is so far below the largest of the tile that E4M3 had few bits or none for it."""
    finite = torch.nan_to_num(scale)
    return finite <= finite.max() * 2.0**-10
