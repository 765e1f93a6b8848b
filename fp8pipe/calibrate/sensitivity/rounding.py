"""What FP8 makes of a weight or an input: quantized by the recipe's scheme and dequantized again.

In: tensors as a layer has them, and a scheme. Out: the values that the FP8 checkpoint computes with, float32. The
scales come from `numerics`, so a weight that is rounded here equals the weight that the engine writes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fp8pipe.config import ActivationScheme, WeightScheme
from fp8pipe.quantize import numerics

_STRIPE_ROWS = 1024
"""Rows of a weight that are rounded at once: float32 copies stay small beside the layer itself."""


def shared_amax(weights: Sequence[Tensor], scheme: WeightScheme, *, samples: Sequence[Tensor] | None = None) -> Tensor:
    """The one range of weights [out, in] that share a per-tensor scale, float32 [].

    The mse observer judges by all rows, or by `samples` (some rows of each weight) where an estimate is enough.
    """
    amax = torch.stack([numerics.tensor_amax(weight).cpu() for weight in weights]).amax()
    if scheme.observer == "minmax":
        return amax
    errors = [numerics.shrink_errors(rows.cpu(), amax)[:, :, 0].sum(1) for rows in samples or weights]
    return numerics.best_amax(amax, torch.stack(errors).sum(0))


def rounded_weight(weight: Tensor, scheme: WeightScheme, amax: Tensor | None = None) -> tuple[Tensor, float]:
    """`weight` [out, in] through E4M3, float32, and the share of it that was clamped.

    amax: the shared range of strategy tensor. Other strategies find theirs in `weight`: whole rows, whole blocks.
    """
    block = scheme.block_shape if scheme.strategy == "block" else None
    amax = _amax_of(weight, scheme) if amax is None else amax
    scale = numerics.weight_scale(amax, power_of_two=scheme.power_of_two).to(weight.device)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    numerics.encode(weight, scale, codes, block=block)
    rounded = numerics.dequantize(codes, scale, block=block)
    if scheme.observer == "minmax":
        return rounded, 0.0
    limit = (scale if block is None else numerics.expand_scale(scale, block, _shape(weight))) * numerics.E4M3_MAX
    return rounded, float((weight.float().abs() > limit).float().mean())


def round_in_place(weight: Tensor, scheme: WeightScheme, amax: Tensor | None) -> None:
    """Replace `weight` [out, in] by its FP8 values in its own dtype."""
    height = _STRIPE_ROWS if scheme.strategy != "block" else 8 * scheme.block_shape[0]
    for stripe in weight.split(height):
        stripe.copy_(rounded_weight(stripe, scheme, amax)[0])


def rounded_input(values: Tensor, scheme: ActivationScheme | None, amax: float, *, group: int) -> Tensor:
    """`values` [tokens, in] through E4M3, float32; not rounded for a weight-only recipe.

    amax: the calibrated range of a static scheme. group: columns that share a scale with strategy group.
    """
    values = values.float()
    if scheme is None:
        return values
    if scheme.strategy == "group":
        pieces = [_through_fp8(piece, piece.abs().amax(1, keepdim=True)) for piece in values.split(group, dim=1)]
        return torch.cat(pieces, dim=1)
    if scheme.mode == "static":
        return _through_fp8(values, torch.tensor(amax, device=values.device))
    return _through_fp8(values, values.abs().amax() if scheme.strategy == "tensor" else values.abs().amax(1, True))


def _through_fp8(values: Tensor, amax: Tensor) -> Tensor:
    scale = numerics.weight_scale(amax)
    return (values / scale).clamp_(-numerics.E4M3_MAX, numerics.E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def _amax_of(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Ranges of rows [out, 1] or of blocks, by the scheme's observer."""
    if scheme.strategy == "channel":
        amax = numerics.channel_amax(weight)
        return amax if scheme.observer == "minmax" else _best(amax, numerics.shrink_errors(weight, amax))
    rows, columns = scheme.block_shape
    amax = numerics.block_amax(weight, scheme.block_shape)
    if scheme.observer == "minmax":
        return amax
    per_row = amax.repeat_interleave(rows, 0)[: len(weight)]
    errors = numerics.shrink_errors(weight, per_row, columns=columns, power_of_two=scheme.power_of_two)
    return _best(amax, torch.stack([band.sum(1) for band in errors.split(rows, dim=1)], dim=1))


def _best(amax: Tensor, errors: Tensor) -> Tensor:
    return numerics.best_amax(amax.cpu(), errors.cpu()).to(amax.device)


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]
