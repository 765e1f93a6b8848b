"""What the pass over the bytes found: counts and first places of each tensor, never arrays of its size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from fp8pipe.model.headers import TensorInfo
from fp8pipe.validate.meaning.formats import Spec

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class Magnitudes:
    """One tensor's largest magnitudes."""

    entry: TensorInfo
    spec: Spec | None
    """How it is quantized; None for tensors that are not."""
    top: int = 0
    """Largest magnitude, as the integer that its bits are without the sign."""
    nonfinite: int = 0
    """Elements that are NaN or Inf."""
    first_nonfinite: int = 0
    """Flat index of the first."""
    units: int = 0
    low: int = 0
    """Units that are not zero and whose largest code is below the format's top."""
    largest_low: int = 0
    """The largest magnitude among those."""

    @property
    def is_zero(self) -> bool:
        return self.entry.nbytes > 0 and self.top == 0


@dataclass(slots=True)
class Scale:
    """One scale tensor."""

    entry: TensorInfo
    kind: str
    """weight, global, input or kv."""
    values: Array | None
    """float32, in its own shape, if they are few."""
    unusable: int = 0
    """Values that are not finite, not above zero, or too small; placeholders not counted."""
    first_unusable: tuple[int, float] | None = None
    """Flat index and value."""
    zeros: int = 0
    uneven: int = 0
    """Values that are no power of two, where all must be; unusable ones not counted."""
    first_uneven: tuple[int, float] | None = None
    """Flat index and value."""
    placeholder: float | None = None
    all_one: bool = False
    largest: float = 0.0
    """Largest finite value."""

    @property
    def value(self) -> float | None:
        """The one value of a scalar."""
        return float(self.values.flat[0]) if self.values is not None and self.values.size == 1 else None


@dataclass(slots=True)
class Share:
    """How many units of a weight something is true of."""

    count: int = 0
    first: int = -1
    """Number of the first unit."""
    value: float = 0.0
    wanted: float = 0.0


@dataclass(slots=True)
class Comparison:
    """One quantized weight beside its source."""

    entry: TensorInfo
    spec: Spec
    shape: tuple[int, int]
    """[out, in]"""
    amax: float = 0.0
    """Largest magnitude of the source."""
    most_clipped: int = 0
    """Source weights beyond the codes' reach, in the unit with the most of them."""
    worst_unit: int = 0
    unequal: int = 0
    """Codes that are not, bit for bit, what rounding gives."""
    off: int = 0
    """Codes further from source / scale than half a step and a bf16 rounding (D1)."""
    first_off: tuple[list[int], float, float] | None = None
    """Index, source / scale, and the code's value, of the first of them."""
    not_nearest: int = 0
    far: int = 0
    """Codes more than one step from the nearest."""
    zero_codes: int = 0
    zero_source: int = 0
    """Source weights that are zero, or below the least range of a scale."""
    error_sq: float = 0.0
    source_sq: float = 0.0
    worst_cosine: float = 1.0
    worst_row: int = 0
    bad_ratio: Share = field(default_factory=Share)
    """Units whose scale * maximum is too far from their largest weight."""
    inexact: dict[str, Share] = field(default_factory=dict)
    """By arithmetic: units whose scale is not exactly absmax / 448 in it."""
    foreign_scales: int = 0
    """Units whose scale this engine would not have chosen, with any observer."""

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def units(self) -> int:
        return math.prod(self.spec.units(self.shape))

    @property
    def unit_size(self) -> int:
        """Weights that share a scale (at the edges of a block grid: at most)."""
        rows, columns = self.shape
        if self.spec.block is not None:
            return min(rows, self.spec.block[0]) * min(columns, self.spec.block[1])
        return columns if self.spec.strategy == "channel" else rows * columns

    @property
    def rel_l2(self) -> float:
        """Norm of the quantization error over the norm of the source."""
        return math.sqrt(self.error_sq / self.source_sq) if self.source_sq else 0.0


@dataclass
class Measured:
    """Everything that the pass found, by tensor name."""

    tensors: dict[str, Magnitudes] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Quantized weights against the source."""
    altered: dict[str, int] = field(default_factory=dict)
    """Tensors that should equal the source, with the byte offset of the first difference."""
    uncompared: dict[str, str] = field(default_factory=dict)
    """Quantized weights that could not be compared, with the dtype of the source's weight."""
    bytes_read: int = 0

    def in_order_of(self, entries: Iterable[TensorInfo]) -> Measured:
        """The same in the order of the files: threads finish in any order."""
        place = {entry.name: number for number, entry in enumerate(entries)}
        return Measured(
            _sorted(self.tensors, place),
            _sorted(self.scales, place),
            _sorted(self.comparisons, place),
            _sorted(self.altered, place),
            _sorted(self.uncompared, place),
            self.bytes_read,
        )


T = TypeVar("T")


def _sorted(part: dict[str, T], place: dict[str, int]) -> dict[str, T]:
    return dict(sorted(part.items(), key=lambda item: place[item[0]]))
