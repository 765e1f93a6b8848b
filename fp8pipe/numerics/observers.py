"""Which range a weight scale should cover.

minmax covers all of it: amax. mse shrinks amax step by step and keeps the range with the least squared error of the
dequantized weight: the few largest weights are clamped so that all others are rounded more finely.

Sums are deterministic: each row is summed by itself in float64, then the row sums of a unit, in row order. Cutting a
tensor into row tiles therefore changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8pipe.numerics.fp8 import E4M3_MAX, TILE_ELEMENTS, weight_scale

SHRINKS: tuple[float, ...] = tuple(step / 100 for step in range(100, 79, -1))
"""Candidates of the mse observer, as shares of amax: 1.00, 0.99, ... 0.80. The first of equals wins."""


def shrink_errors(weight: Tensor, amax: Tensor, *, columns: int | None = None) -> Tensor:
    """Squared error of each row under each shrink of its range.

    `weight` [out, in]; `amax` float32, [] for one range, [out, 1] for one per row; with `columns`, [out, in/columns]
    (rounded up) for one per run of columns. Returns float64 [len(SHRINKS), out, runs], where runs is 1 without
    `columns`."""
    rows_per_tile = max(1, TILE_ELEMENTS // max(1, weight.shape[1]))
    per_row = amax.dim() == 2
    errors = []
    for start in range(0, weight.shape[0], rows_per_tile):
        tile = weight[start : start + rows_per_tile].float()
        tile_amax = amax[start : start + rows_per_tile] if per_row else amax
        errors.append(torch.stack([_row_errors(tile, tile_amax * shrink, columns) for shrink in SHRINKS]))
    return torch.cat(errors, dim=1)


def best_amax(amax: Tensor, errors: Tensor) -> Tensor:
    """The shrunk amax with the least error. `errors` float64 [len(SHRINKS), *amax.shape] -> float32, shape of
    `amax`."""
    shrinks = torch.tensor(SHRINKS, dtype=torch.float32)
    return amax * shrinks[errors.argmin(0)]  # of equals the first, so the widest range


def _row_errors(tile: Tensor, amax: Tensor, columns: int | None) -> Tensor:
    """Squared errors of `tile` float32 [rows, in], summed per row and run: float64 [rows, runs]."""
    scale = weight_scale(amax)
    if columns is not None:
        scale = scale.repeat_interleave(columns, 1)[:, : tile.shape[1]]
    codes = (tile / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    squares = (codes.float().mul_(scale).sub_(tile)).double().square_()
    if columns is None:
        return squares.sum(1, keepdim=True)
    return torch.stack([run.sum(1) for run in squares.split(columns, dim=1)], dim=1)
