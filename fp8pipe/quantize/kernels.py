"""E4M3 on the CPU: scales and codes of weights in numpy arrays, by loops that numba compiles for this machine.

They take one pass over a weight where torch needs four (widen, divide, clamp, convert), and round by one addition:
measured on one core, 5 GB/s of bf16 against torch's 1.4 GB/s in cache tiles. Every operation is the IEEE one (no
fast-math), so the bytes are those of torch, of the reference in the tests, and of a GPU. numba caches what it compiles
beside this file, or in the user's cache folder if that is not writable.

numpy and numba have no bf16, and numba no fp16, so a weight is an array of its bits: bf16 as uint16, fp16 as int16,
fp32 as float32. On a CPU the engine needs no torch, whose import takes longer than all others together."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Array = np.ndarray[Any, Any]
_intrinsic: Any = intrinsic  # numba annotates the generator, not the function that it makes

ARRAYS = {"BF16": np.uint16, "F16": np.int16, "F32": np.float32}
"""Type of the array for each dtype of a weight."""

E4M3_MAX = 448.0
"""Largest finite float8_e4m3fn."""
E4M3_SMALLEST = 2.0**-9
"""Smallest float8_e4m3fn above zero."""

MIN_AMAX = 1e-12
"""Floor of amax, so that weights which are all zero get a scale that can divide."""

_MANTISSA = np.int32(0x7FFFFF)
"""The mantissa bits of a float32."""


def widened(weight: Array) -> Array:
    """The values of a weight, float32."""
    if weight.dtype == np.uint16:
        return (weight.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return weight.view(np.float16).astype(np.float32) if weight.dtype == np.int16 else weight


def amax_blocks(weight: Array, block: tuple[int, int]) -> Array:
    """Largest magnitude in each block of `weight` [out, in], float32 [ceil(out/rows), ceil(in/columns)].

    `block`: (rows, columns). Inf and NaN are kept. Releases the GIL."""
    rows, columns = block
    # Without the sign bit, bits are ordered like the magnitudes: numbers, then Inf, then NaN.
    bits = np.ascontiguousarray(weight).view(np.uint16 if weight.itemsize == 2 else np.uint32)
    tops = np.zeros((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), bits.dtype)
    _amax_blocks(bits, bits.dtype.type(np.iinfo(bits.dtype).max >> 1), tops, rows, columns)
    return widened(tops.view(weight.dtype))


def scale_of(amax: Array, *, power_of_two: bool = False) -> Array:
    """max(amax, 1e-12) / 448, the multiplier from codes to weights: float32, shape of `amax`, which is finite.

    power_of_two: rounded up to one. Codes then lie between 224 and 448 at the top of each unit, and dividing by the
    scale is exact. vLLM's own rounding for DeepGEMM (`requant_weight_ue8m0_inplace`) then changes no weight."""
    scale = np.maximum(amax, np.float32(MIN_AMAX), dtype=np.float32) / np.float32(E4M3_MAX)
    if not power_of_two:
        return scale
    return ((scale.view(np.int32) + _MANTISSA) & ~_MANTISSA).view(np.float32)  # a carry out of the mantissa


def without_codes(amax: Array, scale: Array) -> Array:
    """Whether all codes under these scales are zero: amax is at most half the smallest code, a tie that rounds to zero.

    bool, shape of `amax` and `scale`. Under scales of their own that is true of units up to 2.2e-18."""
    return amax / scale <= np.float32(E4M3_SMALLEST / 2)


def encode_blocks(weight: Array, scale: Array, codes: Array, block: tuple[int, int]) -> None:
    """Write the E4M3 codes of `weight` [out, in] to `codes` (uint8, same shape, contiguous).

    `scale`: float32 [ceil(out/rows), ceil(in/columns)], one per block of (rows, columns). Releases the GIL."""
    assert codes.flags.c_contiguous, "codes are written in place"
    _encode_blocks(np.ascontiguousarray(weight), np.ascontiguousarray(scale), codes, *block)


def load() -> None:
    """Compile the loops for bf16, or load them from the cache, which takes a quarter of a second once per process."""
    _import_without_linear_algebra()
    weight = np.zeros((1, 1), np.uint16)
    encode_blocks(weight, np.ones((1, 1), np.float32), np.zeros((1, 1), np.uint8), (1, 1))
    amax_blocks(weight, (1, 1))


def _import_without_linear_algebra() -> None:
    """Import what numba would import before its first loop, but for scipy.linalg, which takes as long as all the rest.

    numba imports it only to learn whether it could multiply matrices. No loop here does.
    """
    from numba.np import linalg

    def absent() -> None:
        raise ImportError

    found, linalg.ensure_blas = linalg.ensure_blas, absent
    try:
        import numba.np.arraymath  # noqa: F401
    finally:
        linalg.ensure_blas = found


@_intrinsic
def _widen(_context: Any, value: Any) -> Any:
    """float32 of a bf16 (its bits, uint16), of an fp16 (its bits, int16), or of itself."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        (bits,) = arguments
        if value == types.uint16:
            high = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(high, ir.FloatType())
        if value == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        return bits

    return types.float32(value), generate


@_intrinsic
def float_of(_context: Any, _bits: Any) -> Any:
    """float32 with these bits."""
    return types.float32(types.uint32), lambda _c, builder, _s, arguments: builder.bitcast(arguments[0], ir.FloatType())


@_intrinsic
def bits_of(_context: Any, _value: Any) -> Any:
    """uint32 with the bits of a float32."""
    return types.uint32(types.float32), lambda _c, builder, _s, arguments: builder.bitcast(arguments[0], ir.IntType(32))


_SIGN = np.uint32(0x80)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT = np.uint32(0x7F800000)
_SMALLEST = np.uint32((127 - 6) << 23)
"""Exponent bits of 2^-6, the smallest normal E4M3. Below it the step size does not shrink further."""
_ROUNDING = np.uint32(20 << 23)
"""Raises an exponent by 20: a float32 near 2^20 p has the step size of an E4M3 near p."""
_REBIAS = np.uint32((127 - 6) << 3)
_NAN = np.uint32(0x7F)


@njit(inline="always")
def _code(quotient: Any) -> Any:
    """E4M3 code of a float32, clamped to +-448 and rounded to nearest even; NaN gives 0x7F.

    Adding 2^20 p to a value between p and 2p rounds it to a multiple of E4M3's step and leaves the number of steps, 8
    to 16 (0 to 8 below 2^-6), in the low bits of the sum. A carry to 16 runs into the exponent, as it should."""
    bits = bits_of(quotient)
    sign = np.uint32(bits >> np.uint32(24)) & _SIGN
    magnitude = float_of(bits & _MAGNITUDE)
    clamped = np.float32(448.0) if magnitude > np.float32(448.0) else magnitude
    exponent = np.uint32(max(np.uint32(bits_of(clamped) & _EXPONENT), _SMALLEST))
    power = np.uint32(exponent + _ROUNDING)
    steps = np.uint32(bits_of(clamped + float_of(power)) - power)
    code = np.uint32(np.uint32(np.uint32(exponent >> np.uint32(20)) - _REBIAS) + steps)
    return np.uint8(min(code, _NAN) | sign)


@njit(nogil=True, cache=True)
def _encode_blocks(values: Any, scale: Any, codes: Any, rows: int, columns: int) -> None:
    for row in range(values.shape[0]):
        for run in range(scale.shape[1]):
            divisor = scale[row // rows, run]
            source = values[row, run * columns : (run + 1) * columns]
            target = codes[row, run * columns : (run + 1) * columns]
            for column in range(source.shape[0]):
                target[column] = _code(_widen(source[column]) / divisor)


@_intrinsic
def _narrow(_context: Any, value: Any, like: Any) -> Any:
    """`value` as the type of `like`. numba widens integers to 64 bits, of which a vector holds a quarter as many."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], signature.args[0], signature.return_type)

    return like(value, like), generate


@njit(nogil=True, cache=True)
def _amax_blocks(bits: Any, mask: Any, tops: Any, rows: int, columns: int) -> None:
    for row in range(bits.shape[0]):
        for run in range(tops.shape[1]):
            source = bits[row, run * columns : (run + 1) * columns]
            top = tops[row // rows, run]
            for column in range(source.shape[0]):
                top = _narrow(max(top, _narrow(source[column] & mask, mask)), mask)
            tops[row // rows, run] = top
