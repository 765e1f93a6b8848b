"""The arithmetic of FP8 weights: pure tensor functions, no files, no threads, no state.

    magnitudes      amax of a tensor, of its rows, of its blocks; NaN and Inf show up in it           fp8
    scales          weight_scale = max(amax, 1e-12) / 448, float32                                    fp8
    codes           round to nearest even of w / weight_scale, clamped to +-448, float8_e4m3fn        fp8
    observers       which range a scale should cover: minmax, or the shrink with least squared error  observers

On the CPU amax and codes are compiled loops (kernels.py), on a GPU torch's operations; the bits are the same, and the
same on any number of threads: amax is order-free, codes are elementwise, and sums run in one fixed order. The reference
that proves it is in tests/test_numerics.py.
"""

from fp8pipe.quantize.numerics.fp8 import (
    E4M3_MAX,
    MIN_AMAX,
    block_amax,
    channel_amax,
    dequantize,
    encode,
    expand_scale,
    first_nonfinite,
    tensor_amax,
    weight_scale,
)
from fp8pipe.quantize.numerics.observers import SHRINKS, best_amax, shrink_errors

__all__ = [
    "E4M3_MAX",
    "MIN_AMAX",
    "SHRINKS",
    "best_amax",
    "block_amax",
    "channel_amax",
    "dequantize",
    "encode",
    "expand_scale",
    "first_nonfinite",
    "shrink_errors",
    "tensor_amax",
    "weight_scale",
]
