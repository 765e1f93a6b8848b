"""Arithmetic on codes and scale units: pure functions on small arrays, shared by the pass and its judges.

Shapes: codes uint8 [rows, columns]; a unit is what shares a scale, in a grid [1], [rows, 1] or [row blocks, column
blocks]. Magnitudes are compared as integers: without its sign bit any IEEE-like format orders as its bytes do, NaN on
top, so one AND and one max tell at once whether a unit is zero, saturated, infinite or not a number.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fp8pipe.validate.scheme import Codes, Spec

Array = np.ndarray[Any, Any]

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


HALF_UNIT = 256.0


def half_values(codes: torch.Tensor, kind: Codes, out: torch.Tensor) -> torch.Tensor:
    """Values of codes [..., columns] / HALF_UNIT, in `out`, float16 of the same shape. E4M3's NaN comes out as 480.

    Moving the bits into a float16 is six times as fast as torch's own cast: both have their subnormals at the bottom,
    and their exponents differ by 8.
    """
    if kind.per_byte == 2:
        return out.copy_(_E2M1_VALUES[codes.int()]).div_(HALF_UNIT)
    bits = out.view(torch.int16).copy_(codes.view(torch.int8))
    bits.bitwise_left_shift_(7).bitwise_and_(-0x4001)  # bit 14 is an echo of the sign
    return out


def values(codes: torch.Tensor, kind: Codes) -> torch.Tensor:
    """float32 values of codes. E4M3's NaN code comes out as 480: whoever cares looks at the code."""
    return half_values(codes, kind, torch.empty(codes.shape, dtype=torch.float16)).float().mul_(HALF_UNIT)


_E2M1_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_E2M1_EDGES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def nearest(scaled: torch.Tensor, kind: Codes, *, may_clip: bool) -> torch.Tensor:
    """Codes that rounding gives, uint8; ties of E2M1 go down, and whoever judges must allow for that.

    `may_clip`: some values are beyond the largest code."""
    if kind.per_byte == 2:
        magnitude = torch.bucketize(scaled.abs(), _E2M1_EDGES).to(torch.uint8)
        return magnitude | (torch.signbit(scaled).to(torch.uint8) << 3)
    bounded = scaled.clamp(-kind.maximum, kind.maximum) if may_clip else scaled
    return bounded.to(torch.float8_e4m3fn).view(torch.uint8)


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


def unit_counts(flags: torch.Tensor, spec: Spec) -> torch.Tensor:
    """How many of the flags [rows, columns] are set in each unit, int64."""
    if spec.strategy == "tensor":
        return flags.sum().reshape(1)
    if spec.block is None:
        return flags.sum(1, keepdim=True)
    high, wide = spec.block
    bands = torch.stack([band.sum(0) for band in flags.split(high)])
    bands = torch.nn.functional.pad(bands, (0, -bands.shape[1] % wide))
    return bands.view(len(bands), -1, wide).sum(2)


def spread(units: torch.Tensor, spec: Spec, rows: int, columns: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """One value per unit -> a tensor that broadcasts over the weights seen in the shape that comes with it.

    That is [bands, rows of a block, columns] where bands are whole: a row of blocks is spread once, not row by row."""
    if spec.block is None:
        return units, (rows, columns)
    high, wide = spec.block
    along = units.repeat_interleave(wide, 1)[:, :columns]
    if rows % high == 0:
        return along[:, None, :], (rows // high, high, columns)
    return along.repeat_interleave(high, 0)[:rows], (rows, columns)


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
