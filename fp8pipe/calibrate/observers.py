"""Observers: tensors in, one range (amax) per unit out. Running maxima, or histograms for percentile and MSE.

A unit is what shares one scale: the whole tensor, or one KV head. All samples count alike, in a running
maximum or a histogram and never in a moving average, so their order does not matter. Histograms count bf16 codes: for a
bf16 model they represent every value exactly, need no range in advance, and give the same counts on every device.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from fp8pipe.quantize.numerics.fp8 import E4M3_MAX

_BF16_CODES = 1 << 15
"""Codes of non-negative bf16 values, in increasing order of value."""
_MSE_SHRINKS = 81
"""Candidates for the MSE range: amax times 1.00, 0.99, ..., 0.20."""

ObserverKind = Literal["minmax", "percentile", "mse"]


def observer_for(kind: ObserverKind, units: int, percentile: float = 100.0) -> Observer:
    """A new observer. percentile: of the absolute values, for kind percentile."""
    if kind == "minmax":
        return Observer(units)
    return PercentileObserver(units, percentile) if kind == "percentile" else MseObserver(units)


class Observer:
    """Running maximum of absolute values, float32."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.updates = 0
        self._amax = torch.zeros(units)

    def update(self, values: Tensor) -> None:
        """values: [units, ...], or any shape when there is one unit."""
        amax = _amax_of(values, self.units).to(torch.float32)
        self._amax = torch.maximum(self._amax.to(amax.device), amax)  # propagates NaN
        self.updates += 1

    @property
    def finite(self) -> bool:
        """Whether every value so far was finite."""
        return bool(torch.isfinite(self._amax).all())

    def amax(self) -> tuple[float, ...]:
        """Largest absolute value of each unit."""
        return tuple(self._amax.tolist())

    def ranges(self) -> tuple[float, ...]:
        """The range of each unit: the magnitude that becomes 448. Larger ones are clipped."""
        return self.amax()

    def saturation(self) -> float:
        """Share of all values that are beyond the ranges."""
        return 0.0


class _HistogramObserver(Observer):
    """Counts absolute values per bf16 code, and keeps the exact maximum."""

    def __init__(self, units: int) -> None:
        super().__init__(units)
        self._counts = torch.zeros(units, _BF16_CODES, dtype=torch.int64)

    def update(self, values: Tensor) -> None:
        super().update(values)
        codes = values.to(torch.bfloat16).reshape(self.units, -1).view(torch.int16).bitwise_and(_BF16_CODES - 1)
        counts = torch.stack([torch.bincount(row.int(), minlength=_BF16_CODES) for row in codes])
        self._counts = self._counts.to(counts.device) + counts

    def ranges(self) -> tuple[float, ...]:
        counts = self._counts.cpu()
        return tuple(self._range_of(counts[unit], amax) if amax else 0.0 for unit, amax in enumerate(self.amax()))

    def saturation(self) -> float:
        counts, limits = self._counts.cpu(), torch.tensor(self.ranges())
        beyond = _values()[None] > limits[:, None].bfloat16().float()  # values with the range's own code are within
        return int((counts * beyond).sum()) / max(1, int(counts.sum()))

    def _range_of(self, counts: Tensor, amax: float) -> float:
        raise NotImplementedError


class PercentileObserver(_HistogramObserver):
    """The smallest value that at least `percentile` percent of the absolute values do not exceed."""

    def __init__(self, units: int, percentile: float) -> None:
        super().__init__(units)
        self.percentile = percentile

    def _range_of(self, counts: Tensor, amax: float) -> float:
        cumulative = counts.cumsum(0)
        wanted = math.ceil(Fraction(str(self.percentile)) * int(cumulative[-1]) / 100)  # exact: 99.9 is no binary float
        code = int(torch.searchsorted(cumulative, wanted))
        return min(float(_values()[code]), amax)


class MseObserver(_HistogramObserver):
    """The shrunken amax that minimises the squared error of E4M3 with scale = range / 448."""

    def _range_of(self, counts: Tensor, amax: float) -> float:
        used = counts.nonzero().squeeze(1)
        values, weights = _values()[used], counts[used].double()
        candidates = torch.tensor(amax) * torch.linspace(1.0, 0.2, _MSE_SHRINKS)
        errors = [_squared_error(values, weights, candidate / E4M3_MAX) for candidate in candidates]
        return float(candidates[torch.stack(errors).argmin()])


def _amax_of(values: Tensor, units: int) -> Tensor:
    """Largest absolute value per unit, in one pass and without a temporary tensor. NaN stays NaN."""
    low, high = torch.aminmax(values) if units == 1 else torch.aminmax(values.reshape(units, -1), dim=1)
    return torch.maximum(high, -low).reshape(units)


def _squared_error(values: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    rounded = (values / scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32) * scale
    return (weights * (values - rounded).double().square()).sum()


def _values() -> Tensor:
    """The float32 value of every non-negative bf16 code. [32768]"""
    return torch.arange(_BF16_CODES, dtype=torch.int16).view(torch.bfloat16).to(torch.float32)
