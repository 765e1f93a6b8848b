"""Values to E4M3 codes and scales, and back: the arithmetic of vLLM's GPU kernels, in torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

FP8_MAX = 448.0
"""Largest finite E4M3 (fn) value."""

MIN_SCALE = 1.0 / (FP8_MAX * 512.0)
"""Lower bound of dynamic scales per token and per tensor, as in vLLM's kernels; avoids division by zero."""

MIN_GROUP_AMAX = 1e-10
"""Lower bound of a group's amax, as in vLLM's `per_token_group_quant_fp8`."""


def scaled_fp8_quant(
    input: Tensor,
    scale: Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: Tensor | None = None,
    group_shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """E4M3 codes [max(M, num_token_padding), N] and scales for `input` [M, N]; has the signature of vLLM's function.

    codes = round(clamp(float32(input) / scale, -448, 448)), to nearest even. A static `scale` has one value, one per
    row or column, or one per group. A dynamic one is amax / 448 in float32, per tensor [1] or per token [M, 1];
    `scale_ub` bounds the amax of a token. Padding rows are zero, with scale one.
    """
    assert input.ndim == 2, f"expected [tokens, features], found {tuple(input.shape)}"
    rows = max(num_token_padding or 0, input.shape[0])
    if scale is None:
        scale = _dynamic_scale(input, use_per_token_if_dynamic, scale_ub)
    divisor = _spread(scale.float(), (input.shape[0], input.shape[1]), group_shape)
    codes = _codes(input.float() / divisor)
    if output is None and rows == input.shape[0]:
        return codes, scale
    if output is None:
        output = torch.zeros(rows, input.shape[1], dtype=torch.float8_e4m3fn)
    output[: input.shape[0]] = codes
    if scale.shape == (input.shape[0], 1) and rows > input.shape[0]:
        scale = torch.cat([scale, torch.ones(rows - input.shape[0], 1)])
    return output, scale


def quantize_groups(input: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """E4M3 codes [M, K] and float32 scales [M, ceil(K / group)], amax / 448 of each `group` values in a row."""
    rows, features = input.shape
    runs = pad(input.float(), (0, -features % group)).unflatten(1, (-1, group))
    scale = runs.abs().amax(dim=2).clamp_(min=MIN_GROUP_AMAX) / FP8_MAX
    codes = _codes(runs / scale.unsqueeze(2))
    return codes.view(rows, -1)[:, :features], scale


def dequantize(codes: Tensor, scale: Tensor, group_shape: tuple[int, int] | None = None) -> Tensor:
    """float32 values [R, C] of E4M3 codes [R, C]; `scale` is one value, [R, 1], or one per `group_shape` of codes.

    The value of a code is exact in float32. A float32 product of dequantized operands therefore differs from the GPU's
    order (multiply codes, sum in float32, scale the sum) by two roundings to 24 bits, negligible next to E4M3's 4.
    """
    return codes.float().mul_(_spread(scale.float(), (codes.shape[0], codes.shape[1]), group_shape))


def _codes(quotients: Tensor) -> Tensor:
    """The nearest E4M3 values, ties to even, saturating. Overwrites `quotients`."""
    return quotients.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _dynamic_scale(input: Tensor, per_token: bool, upper_bound: Tensor | None) -> Tensor:
    """amax / 448 in float32, [M, 1] per token or [1] per tensor, at least MIN_SCALE."""
    magnitude = input.abs()
    amax = magnitude.amax(dim=1, keepdim=True) if per_token else magnitude.amax().reshape(1)
    amax = amax.float()
    if per_token and upper_bound is not None:
        amax = amax.clamp(max=upper_bound.float())
    return (amax / FP8_MAX).clamp_(min=MIN_SCALE)


def _spread(scale: Tensor, shape: tuple[int, int], group_shape: tuple[int, int] | None) -> Tensor:
    """`scale` in a shape that broadcasts to `shape`, [M, N]."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        # One value per row or per column; the group's shape says which (-1 is the full extent).
        assert group_shape is not None, f"a 1-D scale of {scale.numel()} values needs group_shape"
        scale = scale.unsqueeze(0 if group_shape[0] == -1 else 1)
    for dim in (0, 1):
        if scale.shape[dim] not in (1, shape[dim]):
            # The last group may be shorter, so where the group's length is given it must not be derived from extents.
            group = group_shape[dim] if group_shape else -(-shape[dim] // scale.shape[dim])
            scale = scale.repeat_interleave(group, dim=dim).narrow(dim, 0, shape[dim])
    return scale
