"""Number formats and how a weight is stored in them: dtypes, names of its tensors, shapes of its scales.

FP8      F8_E4M3 [out, in], scales per tensor, channel or block              compressed-tensors, fp8, modelopt
MXFP8    F8_E4M3 [out, in], U8 exponents [out, in/32]                        compressed-tensors, modelopt
MXFP4    U8 [out, in/2], U8 exponents [out, in/32]                           compressed-tensors
NVFP4    U8 [out, in/2], F8_E4M3 [out, in/16], one F32 for the whole weight  compressed-tensors, modelopt
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Strategy = Literal["tensor", "channel", "block", "group"]


@dataclass(frozen=True, slots=True)
class Codes:
    """How a code stands for a number: sign, exponent, mantissa, without infinities."""

    dtype: str
    """Of the tensor that holds them."""
    per_byte: int
    maximum: float
    reach: float
    """The largest number that rounds to the maximum, half a step above it: beyond, a weight is clipped."""
    mantissa_bits: int
    min_exponent: int
    """Of normal numbers; below it the step stays the same."""


E4M3 = Codes("F8_E4M3", 1, 448.0, 464.0, 3, -6)
E2M1 = Codes("U8", 2, 6.0, 7.0, 1, 0)
"""Two to a byte, the even column in the low half."""


@dataclass(frozen=True, slots=True)
class Format:
    """A number format for weights, and what a faithful quantization to it looks like."""

    name: Literal["FP8", "MXFP8", "NVFP4", "MXFP4"]
    codes: Codes
    scale_dtypes: tuple[str, ...]
    rel_l2: tuple[float, float]
    """Error (L2) of a whole weight, relative: beyond the first a warning, beyond the second an error. Measured: FP8
    0.026, NVFP4 0.091."""
    min_cosine: float
    """The least cosine of a row with its source. If every weight were off by half a step (FP8: 1/16 of its value), the
    cosine would still be just above this."""
    amax_ratio: tuple[float, float]
    """scale * maximum code / largest weight of the unit: 1 for absmax, down to one half for MSE observers; rounded
    scales (bf16, E4M3, powers of two) lie around it."""
    top: int
    """Least magnitude code that the largest weight of a unit gets under an absmax scale."""
    zeros: float
    """The largest share of a weight's elements that may be nonzero in the source and zero in the codes."""
    by_powers: bool = False
    """Scales are powers of two, stored as floats."""


FP8 = Format("FP8", E4M3, ("F32", "BF16", "F16"), (0.035, 0.06), 0.998, (0.5, 1.01), 0x7D, 0.02)
MXFP8 = Format("MXFP8", E4M3, ("U8",), (0.04, 0.07), 0.997, (0.5, 2.01), 0x76, 0.02)
FP8_BY_POWERS = replace(
    FP8,
    rel_l2=MXFP8.rel_l2,
    min_cosine=MXFP8.min_cosine,
    amax_ratio=MXFP8.amax_ratio,
    top=MXFP8.top,
    by_powers=True,
)
"""FP8 whose scales are powers of two: `scale_fmt` ue8m0."""
NVFP4 = Format("NVFP4", E2M1, ("F8_E4M3",), (0.12, 0.2), 0.96, (0.5, 1.07), 7, 0.25)
MXFP4 = Format("MXFP4", E2M1, ("U8",), (0.16, 0.25), 0.95, (0.5, 2.01), 6, 0.25)

FORMAT_NAMES = {
    "FP8": ("float-quantized", "naive-quantized"),
    "NVFP4": ("nvfp4-pack-quantized",),
    "MXFP4": ("mxfp4-pack-quantized",),
    "MXFP8": ("mxfp8-quantized",),
}
"""`format` of compressed-tensors for each of them."""
MIXED = "mixed-precision"


@dataclass(frozen=True, slots=True)
class Spec:
    """How one group of modules is stored."""

    format: Format
    strategy: Strategy
    block: tuple[int, int] | None
    """Rows and columns that share a scale, for strategies block and group (one row)."""
    inputs: Literal["static", "dynamic"] | None
    """None: weight-only."""
    weight: str = "weight"
    """Leaf names of the tensors."""
    scale: str = "weight_scale"
    global_scale: str | None = None
    """One F32 beside the scales of NVFP4."""
    global_divides: bool = False
    """weight = code * scale / global_scale, not times it."""
    input_scale: str = "input_scale"
    spare: tuple[str, ...] = ()
    """Leaves that vLLM accepts beside them and drops."""
    scale_form: Literal["plain", "flat", "blocks"] = "plain"
    """How the scale's shape is written: [out, 1]; ModelOpt's [out]; ModelOpt's [out/rows, 1, in/columns, 1]."""
    minmax: bool = True
    """The config names an observer that scales by the absolute maximum (or names none)."""

    @property
    def companions(self) -> tuple[str, ...]:
        """Leaf names that must stand beside the weight."""
        names = (self.scale,) if self.global_scale is None else (self.scale, self.global_scale)
        return (*names, self.input_scale) if self.inputs == "static" else names

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape on disk of a weight [out, in]."""
        return (*shape[:-1], shape[-1] // self.format.codes.per_byte) if shape else shape

    def unpacked(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """[out, in] of a weight as it is stored; only for matrices."""
        return shape[0], shape[1] * self.format.codes.per_byte

    def units(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Grid of the weights [out, in] that share a scale."""
        if self.strategy == "tensor":
            return (1,)
        if self.strategy == "channel":
            return (shape[0], 1)
        assert self.block is not None
        return (-(-shape[0] // self.block[0]), -(-shape[1] // self.block[1]))

    def scale_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes that vLLM accepts for the scale of a weight [out, in], the usual one first."""
        units = self.units(shape)
        if self.strategy == "tensor":
            return ((1,), ())
        if self.scale_form == "flat":
            return ((shape[0],),)
        return ((units[0], 1, units[1], 1), units) if self.scale_form == "blocks" else (units,)


def by_powers(spec: Spec) -> Spec:
    """`spec` with scales that are powers of two, if it has FP8 weights in blocks."""
    return replace(spec, format=FP8_BY_POWERS) if spec.format is FP8 and spec.strategy == "block" else spec
