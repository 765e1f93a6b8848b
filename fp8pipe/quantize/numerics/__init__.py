"""The arithmetic of FP8 weights: pure tensor functions, no files, no threads, no state.

    fp8          amax of a tensor, its rows or blocks; weight_scale = max(amax, 1e-12) / 448, or the power of two from
                 there up; E4M3 codes
    observers    which range a scale covers: minmax, or the shrink with the least squared error

On the CPU they run the loops of ../kernels.py, which the engine calls without torch. A GPU runs torch's operations and
gives the same bits, as does any number of threads: amax does not depend on order, codes are elementwise, and sums run
in a fixed order. tests/quantize/test_numerics.py proves it against a reference.
"""

from fp8pipe.quantize.kernels import E4M3_MAX, MIN_AMAX
from fp8pipe.quantize.numerics.fp8 import (
    array_of,
    block_amax,
    channel_amax,
    dequantize,
    encode,
    expand_scale,
    first_nonfinite,
    tensor_amax,
    tensor_of,
    weight_scale,
)
from fp8pipe.quantize.numerics.observers import SHRINKS, best_amax, shrink_errors

__all__ = [
    "E4M3_MAX",
    "MIN_AMAX",
    "SHRINKS",
    "array_of",
    "best_amax",
    "block_amax",
    "channel_amax",
    "dequantize",
    "encode",
    "expand_scale",
    "first_nonfinite",
    "shrink_errors",
    "tensor_amax",
    "tensor_of",
    "weight_scale",
]
