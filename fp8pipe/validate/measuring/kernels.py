"""The validator's inner loop over E4M3 codes and their source, compiled for this machine's CPU by numba.

In: tiles of whole rows as numpy arrays. Out: what `compare` keeps of them. One pass instead of a dozen: one core of the
measured kind compares 1.6 GB/s of bf16, in torch 0.4. No fast-math: a quotient and its rounding are the IEEE ones. The
rounding is written down here once more, by integers, so that a mistake of the engine is not repeated by its judge.
Numbers of a source come as their bits: bf16 as uint16, float32 as uint32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from fp8pipe.quantize.kernels import bits_of, float_of

LANES = 128
"""Columns at a time. Their sums are kept apart, since without fast-math a single sum cannot be made in parallel."""

_U8, _U16, _U32, _F32 = np.uint8, np.uint16, np.uint32, np.float32
_MAGNITUDE = _U32(0x7FFF_FFFF)
_INFINITY = _U32(0x7F80_0000)
_MAXIMUM = _U32(0x43E0_0000)
"""Bits of 448."""
_REACH = _U32(0x43E8_0000)
"""Bits of 464, half a step above it: beyond, a weight is clipped."""
_NORMAL = _U32(0x3C80_0000)
"""Bits of 2^-6, E4M3's smallest normal number."""
_FAINT = _U32(0x2B8C_BCCC)
"""Bits of 1e-12 (`units.FAINT`). A weight below it counts as zero, for it is lost under any scale but the least."""
_STEADY = _F32(16384)
"""Of float32 numbers about 2^14 the last bit is worth 2^-9, E4M3's step below its normal numbers."""
_STEADY_BITS = _U32(0x4680_0000)
_REBIAS = _U32((127 - 7) << 3)
_SMALL_STEP = _F32(2.0**-9)


@njit(inline="always")
def _rounded(magnitude: Any) -> Any:
    """E4M3 code, without its sign, nearest to the float32 with these bits; beyond 448 that of 448, NaN for NaN."""
    bounded = min(magnitude, _MAXIMUM)
    even = _U32(_U32(bounded >> _U32(20)) & _U32(1))
    normal = _U32(_U32(_U32(_U32(bounded + _U32(0x7FFFF)) + even) >> _U32(20)) - _REBIAS)
    small = _U32(bits_of(float_of(bounded) + _STEADY) - _STEADY_BITS)
    code = small if bounded < _NORMAL else normal
    return _U32(0x7F) if magnitude > _INFINITY else code


@njit(inline="always")
def _value(code: Any) -> Any:
    """float32 value of an E4M3 code, without its sign."""
    normal = float_of(_U32(_U32(code << _U32(20)) + _U32((127 - 7) << 23)))
    value = _F32(code) * _SMALL_STEP if code < _U32(8) else normal
    return _F32(np.nan) if code == _U32(0x7F) else value


@njit(nogil=True, cache=True)
def compare(
    source: Any, codes: Any, scales: Any, high: int, wide: int, tops: Any, clipped: Any, norms: Any, differs: Any
) -> Any:
    """Hold E4M3 `codes` to `source` (both [rows, columns]) under the float32 `scales` of units of `high` x `wide`.

    Fills, per unit: int32 `tops`, bits of the largest source magnitude; int64 `clipped`, clipped sources. Per
    row: float64 `norms` [3, rows], squared norms of source, restored weight and error. int32 `differs`: flat indices of
    the codes that rounding does not give. Returns how many those are, zero codes, and zero or
    faint sources.
    """
    rows, columns = codes.shape
    lanes = np.zeros(3 * LANES, np.float32)
    wanted = np.empty(LANES, np.uint8)
    unequal, zero_codes, zero_source = 0, 0, 0
    for row in range(rows):
        lanes[:] = 0
        unit_scales = scales[row // high]
        largest = unit_scales.max()
        for unit in range(unit_scales.shape[0]):
            scale = unit_scales[unit]
            end = min((unit + 1) * wide, columns)
            top, beyond = _U32(0), 0
            for left in range(unit * wide, end, LANES):
                right = min(left + LANES, end)
                part = codes[row, left:right]
                seen = _compare_run(source[row, left:right], part, scale, scale / largest, lanes, wanted)
                top = max(top, seen[0])
                beyond += seen[1]
                zero_codes += seen[2]
                zero_source += seen[3]
                if seen[4]:
                    for column in range(right - left):
                        if part[column] != wanted[column]:
                            differs[unequal] = row * columns + left + column
                            unequal += 1
            tops[row // high, unit] = max(tops[row // high, unit], top)
            clipped[row // high, unit] += beyond
        square = np.float64(largest) * np.float64(largest)
        for kind in range(3):
            total = 0.0
            for lane in range(LANES):
                total += lanes[kind * LANES + lane]
            norms[kind, row] = total * square
    return unequal, zero_codes, zero_source


@njit(inline="always")
def _compare_run(source: Any, codes: Any, scale: Any, share: Any, lanes: Any, wanted: Any) -> Any:
    """At most LANES columns of one unit: (largest source bits, clipped, zero codes, zero sources, any difference)."""
    top, beyond, zero_codes, zero_source, difference = _U32(0), _U32(0), _U32(0), _U32(0), _U32(0)
    shift = _U32(16 if source.itemsize == 2 else 0)
    for column in range(codes.shape[0]):
        bits = _U32(_U32(source[column]) << shift)
        top = max(top, _U32(bits & _MAGNITUDE))
        scaled = float_of(bits) / scale
        target = bits_of(scaled)
        magnitude = _U32(target & _MAGNITUDE)
        code = _U32(codes[column])
        short = _U32(code & _U32(0x7F))
        best = _U32(_rounded(magnitude) | _U32(_U32(target >> _U32(24)) & _U32(0x80)))
        wanted[column] = _U8(best)
        difference = _U32(difference | _U32(best ^ code))
        beyond = _U32(beyond + _U32((magnitude > _REACH) & (magnitude <= _INFINITY)))
        zero_codes = _U32(zero_codes + _U32(short == _U32(0)))
        zero_source = _U32(zero_source + _U32(_U32(bits & _MAGNITUDE) < _FAINT))
        sign = _U32(_U32(code & _U32(0x80)) << _U32(24))
        restored = float_of(_U32(bits_of(_value(short)) | sign))
        weight = scaled * share
        error = (scaled - restored) * share
        restored = restored * share
        lanes[column] += weight * weight
        lanes[LANES + column] += restored * restored
        lanes[2 * LANES + column] += error * error
    return top, beyond, zero_codes, zero_source, difference
