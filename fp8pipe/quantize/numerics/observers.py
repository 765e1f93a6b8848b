"""Which range a weight scale covers.

minmax covers everything, up to amax. mse tries smaller ranges and keeps the one with the least squared error of the
dequantized weight: a few large weights are clamped so that all others are rounded more finely.

Every candidate is tried on every weight, so the result is exact. It is fast because all candidates share a cache tile
of magnitudes, and because codes are rounded as float32 and never converted. Sums are deterministic: each run of columns
is summed by itself in float64, so that cutting a tensor into row tiles changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8pipe.quantize.numerics.fp8 import E4M3_MAX, weight_scale

SHRINKS: tuple[float, ...] = tuple(step / 100 for step in range(100, 79, -1))
"""Candidates of the mse observer as shares of amax: 1.00, 0.99, ... 0.80. The widest of equally good ones wins."""

TILE_ELEMENTS = 1 << 17
"""Elements per cache tile: magnitudes, quotients and float64 squares together fit an L2 cache of 2 MiB."""

_SMALLEST_NORMAL = 2.0**-6
_EXPONENT = 0x7F800000
"""The exponent bits of a float32. Alone, they are the power of two below it."""


def shrink_errors(weight: Tensor, amax: Tensor, *, columns: int | None = None, power_of_two: bool = False) -> Tensor:
    """Squared error of each row under each shrink of its range, float64 [len(SHRINKS), out, runs].

    `weight`: [out, in]. `amax`: float32, [] for one range, [out, 1] for one per row, [out, runs] for one per run of
    `columns` columns. runs is ceil(in/columns), or 1 without `columns`. power_of_two: as in `weight_scale`."""
    rows, width = weight.shape
    columns = columns or width
    runs = -(-width // columns)
    candidates = [weight_scale(amax * shrink, power_of_two=power_of_two) for shrink in SHRINKS]
    scales = torch.stack([scale.expand(rows, runs) for scale in candidates])
    errors = torch.empty_like(scales, dtype=torch.float64)
    height = max(1, TILE_ELEMENTS // (2 * max(1, width)))  # half a tile, for the float64 values beside it
    for start in range(0, rows, height):
        part = slice(start, start + height)
        tile = torch.nn.functional.pad(weight[part], (0, runs * columns - width))  # zeros add no error
        magnitudes = tile.float().abs_().view(len(tile), runs, columns)
        _errors(magnitudes, scales[:, part, :, None], errors[:, part])
    return errors


def best_amax(amax: Tensor, errors: Tensor) -> Tensor:
    """The shrunk amax with the least error, float32, shape of `amax`. `errors`: float64 [len(SHRINKS), *amax.shape]."""
    shrinks = torch.tensor(SHRINKS, dtype=torch.float32)
    return amax * shrinks[errors.argmin(0)]  # argmin takes the first of equals, the widest range


def round_e4m3(values: Tensor, powers: Tensor) -> Tensor:
    """Round `values` (float32 in [0, 448]) in place to the nearest E4M3, ties to even.

    `powers`: a buffer, int32, same shape. E4M3 has 3 bits after the leading one, so its step between p and 2p is p/8,
    which is that of a float32 between 2^20 p and 2^21 p: adding 2^20 p rounds, and subtracting it again is exact. Below
    2^-6 the step stays the same."""
    torch.bitwise_and(values.view(torch.int32), _EXPONENT, out=powers)
    steps = powers.view(torch.float32).clamp_(min=_SMALLEST_NORMAL)
    return values.add_(steps, alpha=2**20).sub_(steps, alpha=2**20)


def _errors(magnitudes: Tensor, scales: Tensor, errors: Tensor) -> None:
    """Write the squared errors of `magnitudes` under each of `scales` to `errors`, summed over columns.

    `magnitudes`: float32 [rows, runs, columns]; `scales`: [shrinks, rows, runs, 1]; `errors`: float64 [shrinks, rows,
    runs]."""
    work = torch.empty_like(magnitudes)
    powers = torch.empty_like(magnitudes, dtype=torch.int32)
    squares = torch.empty_like(magnitudes, dtype=torch.float64)
    for scale, sums in zip(scales, errors, strict=True):
        torch.div(magnitudes, scale, out=work)
        round_e4m3(work.clamp_(max=E4M3_MAX), powers).mul_(scale).sub_(magnitudes)
        torch.sum(squares.copy_(work).square_(), 2, out=sums)
