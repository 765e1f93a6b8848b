"""Which range a weight scale should cover.

minmax covers all of it: amax. mse shrinks amax step by step and keeps the range with the least squared error of the
dequantized weight: the few largest weights are clamped so that all others are rounded more finely.

Every candidate is tried on every weight, so that the choice is that of the textbook; what makes it fast is a cache
tile of magnitudes that all candidates share, and codes that are rounded as float32, never converted. Sums are
deterministic: each run is summed by itself in float64. Cutting a tensor into row tiles therefore changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8pipe.quantize.numerics.fp8 import E4M3_MAX, weight_scale

SHRINKS: tuple[float, ...] = tuple(step / 100 for step in range(100, 79, -1))
"""Candidates of the mse observer, as shares of amax: 1.00, 0.99, ... 0.80. The first of equals wins."""

TILE_ELEMENTS = 1 << 17
"""Elements per cache tile: magnitudes, work and their squares in float64 together stay inside a 2 MiB L2."""

_SMALLEST_NORMAL = 2.0**-6
_EXPONENT = 0x7F800000
"""Bits of a float32 that hold its exponent: alone, they are the power of two below it."""


def shrink_errors(weight: Tensor, amax: Tensor, *, columns: int | None = None) -> Tensor:
    """Squared error of each row under each shrink of its range.

    `weight` [out, in]; `amax` float32, [] for one range, [out, 1] for one per row; with `columns`, [out, in/columns]
    (rounded up) for one per run of columns. Returns float64 [len(SHRINKS), out, runs], where runs is 1 without
    `columns`."""
    rows, width = weight.shape
    columns = columns or width
    runs = -(-width // columns)
    scales = torch.stack([weight_scale(amax * shrink).expand(rows, runs) for shrink in SHRINKS])
    errors = torch.empty_like(scales, dtype=torch.float64)
    height = max(1, TILE_ELEMENTS // (2 * max(1, width)))  # half a tile: there are float64 values beside it
    for start in range(0, rows, height):
        part = slice(start, start + height)
        tile = torch.nn.functional.pad(weight[part], (0, runs * columns - width))  # zeros add no error
        magnitudes = tile.float().abs_().view(len(tile), runs, columns)
        _errors(magnitudes, scales[:, part, :, None], errors[:, part])
    return errors


def best_amax(amax: Tensor, errors: Tensor) -> Tensor:
    """The shrunk amax with the least error. `errors` float64 [len(SHRINKS), *amax.shape] -> float32, shape of
    `amax`."""
    shrinks = torch.tensor(SHRINKS, dtype=torch.float32)
    return amax * shrinks[errors.argmin(0)]  # of equals the first, so the widest range


def round_e4m3(values: Tensor, powers: Tensor) -> Tensor:
    """Round `values` (float32 in [0, 448]) in place to the nearest E4M3, ties to even; `powers`: room, int32, same
    shape.

    E4M3 has 3 bits after the leading one, so its steps between p and 2p are p/8, the same as those of a float32
    between 2^20 p and 2^21 p: adding 2^20 p rounds, taking it away again is exact. Below 2^-6 the steps stay."""
    torch.bitwise_and(values.view(torch.int32), _EXPONENT, out=powers)
    steps = powers.view(torch.float32).clamp_(min=_SMALLEST_NORMAL)
    return values.add_(steps, alpha=2**20).sub_(steps, alpha=2**20)


def _errors(magnitudes: Tensor, scales: Tensor, errors: Tensor) -> None:
    """Sums of squared errors of `magnitudes` float32 [rows, runs, columns] under each of `scales` [shrinks, rows,
    runs, 1], into `errors` float64 [shrinks, rows, runs]."""
    work = torch.empty_like(magnitudes)
    powers = torch.empty_like(magnitudes, dtype=torch.int32)
    squares = torch.empty_like(magnitudes, dtype=torch.float64)
    for scale, sums in zip(scales, errors, strict=True):
        torch.div(magnitudes, scale, out=work)
        round_e4m3(work.clamp_(max=E4M3_MAX), powers).mul_(scale).sub_(magnitudes)
        torch.sum(squares.copy_(work).square_(), 2, out=sums)
