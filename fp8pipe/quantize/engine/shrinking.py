"""The mse observer on stripes: arrays of ../kernels.py in, arrays out. On a CPU nothing else needs torch."""

from __future__ import annotations

import torch

from fp8pipe.config import WeightScheme
from fp8pipe.quantize import numerics
from fp8pipe.quantize.kernels import Array


def errors_of(stripe: Array, amax: float) -> Array:
    """Squared error of a stripe under each shrink of the range of its tensor, float64 [shrinks]."""
    return numerics.shrink_errors(numerics.tensor_of(stripe), torch.tensor(amax)).sum((1, 2)).numpy()


def shrunk(amax: float, errors: list[Array]) -> float:
    """The range with the least error over all stripes of a tensor, in their order."""
    total = torch.stack([torch.from_numpy(part) for part in errors]).sum(0)
    return float(numerics.best_amax(torch.tensor(amax), total))


def shrunk_units(stripe: Array, amax: Array, scheme: WeightScheme) -> Array:
    """`amax` of each row or block of a stripe, shrunk to its least error."""
    weight, ranges = numerics.tensor_of(stripe), torch.from_numpy(amax)
    if scheme.strategy == "channel":
        return numerics.best_amax(ranges, numerics.shrink_errors(weight, ranges)).numpy()
    rows, columns = scheme.block_shape
    per_row = ranges.repeat_interleave(rows, 0)[: len(weight)]
    errors = numerics.shrink_errors(weight, per_row, columns=columns, power_of_two=scheme.power_of_two)
    of_blocks = torch.stack([band.sum(1) for band in errors.split(rows, dim=1)], dim=1)  # [shrinks, blocks, runs]
    return numerics.best_amax(ranges, of_blocks).numpy()
