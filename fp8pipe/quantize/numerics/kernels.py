"""Loops for which torch needs several passes, compiled by numba for this machine's CPU.

They take one pass over a weight instead of four (widen, divide, clamp, convert), and round by one addition: measured
on one core, 5 GB/s of bf16 against torch's 1.4 GB/s in cache tiles. Every operation is the IEEE one (no fast-math), so
the bytes are those of torch, of the reference in the tests, and of a GPU. numba caches what it compiles beside this
file, or in the user's cache folder if that is not writable.

numba has no bf16 and no fp16, so their bits are passed as integers: bf16 as uint16, fp16 as int16."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

_intrinsic: Any = intrinsic  # numba annotates the generator, not the function that it makes

_BITS_AS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}


_INTEGER = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}
"""Integer types of the bits. Without the sign bit they are ordered like the magnitudes: numbers, then Inf, then NaN."""


def amax_blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude in each block of `weight` [out, in], float32 [ceil(out/rows), ceil(in/columns)].

    `weight`: bf16, fp16 or fp32, on the CPU; `block`: (rows, columns). NaN is kept. Releases the GIL."""
    rows, columns = block
    shape = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    tops = torch.zeros(shape, dtype=_INTEGER[weight.dtype])
    bits = weight.detach().contiguous().view(tops.dtype).numpy()
    mask = bits.dtype.type(torch.iinfo(tops.dtype).max >> 1)
    _amax_blocks(bits, mask, tops.numpy(), rows, columns)
    return tops.view(weight.dtype).float()


def encode_blocks(weight: Tensor, scale: Tensor, codes: Tensor, block: tuple[int, int]) -> None:
    """Write the E4M3 codes of `weight` [out, in] (bf16, fp16 or fp32) to `codes` (float8_e4m3fn, same shape).

    Both are on the CPU. `scale`: float32 [ceil(out/rows), ceil(in/columns)], one per block of (rows, columns).
    Releases the GIL."""
    assert codes.is_contiguous(), "codes are written in place"
    values = weight.detach().contiguous().view(_BITS_AS[weight.dtype]).numpy()
    _encode_blocks(values, scale.detach().contiguous().numpy(), codes.view(torch.uint8).numpy(), *block)


def load() -> None:
    """Compile the loops for bf16, or load them from the cache, which takes half a second once per process."""
    weight, codes = torch.zeros(1, 1, dtype=torch.bfloat16), torch.empty(1, 1, dtype=torch.float8_e4m3fn)
    encode_blocks(weight, torch.ones(1, 1), codes, (1, 1))
    amax_blocks(weight, (1, 1))


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
