"""vLLM plugin `fp8pipe_cpu`: the FP8 operations that vLLM's CPU build declares but does not implement.

The CPU build holds placeholders for the quantization ops behind `vllm._custom_ops.scaled_fp8_quant` and lacks the
fused SiluAndMul + static FP8 kernel. `register` supplies the first in torch and takes the second out of vLLM's dispatch
table, so that real vLLM runs every per-tensor and per-token FP8 layout on a CPU, FP8 KV cache included. Semantics come
before speed. On any other platform `register` does nothing. vLLM calls it in every process, through the entry point in
`vllm.general_plugins`; importing this module costs nothing but the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NAME = "fp8pipe_cpu"
"""The entry point's name; `VLLM_PLUGINS` may leave it out."""

FP8_MAX = 448.0
"""Largest finite E4M3 (fn) value."""

MIN_SCALE = 1.0 / (FP8_MAX * 512.0)
"""Lower bound of dynamic scales, as in vLLM's own kernels: an all-zero row gets a scale it can be divided by."""


def register() -> None:
    """Entry point: supply what the CPU platform lacks; a no-op elsewhere, and when called again."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fusion import fused_act_quant
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    # A placeholder's schema takes no argument. A build that has the real op keeps it.
    if not torch.ops._C.static_scaled_fp8_quant.default._schema.arguments:
        _custom_ops.scaled_fp8_quant = scaled_fp8_quant
    if not hasattr(torch.ops._C, "silu_and_mul_quant"):
        fused_act_quant._FUSED_ACT_QUANT.pop((SiluAndMul, kFp8StaticTensorSym), None)


def active() -> bool:
    """Whether this process serves FP8 through the operations of this module."""
    from vllm import _custom_ops

    return _custom_ops.scaled_fp8_quant is scaled_fp8_quant


def scaled_fp8_quant(
    input: Tensor,
    scale: Tensor | None = None,
    num_token_padding: int | None = None,
    scale_ub: Tensor | None = None,
    use_per_token_if_dynamic: bool = False,
    output: Tensor | None = None,
    group_shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """E4M3 codes [max(M, num_token_padding), N] and scales for `input` [M, N]; signature of vLLM's function.

    codes = round(clamp(float32(input) / scale, -448, 448)), to nearest even. `scale` is given (one value, one per
    row or column, or one per group), or made from the data: amax / 448 per tensor [1] or per token [M, 1], float32.
    `scale_ub` bounds the amax of a token. Padding rows are zero with scale one.
    """
    import torch

    assert input.ndim == 2, f"expected [tokens, features], found {tuple(input.shape)}"
    rows = max(num_token_padding or 0, input.shape[0])
    if scale is None:
        scale = _dynamic_scale(input, use_per_token_if_dynamic, scale_ub)
    divisor = _spread(scale.float(), (input.shape[0], input.shape[1]), group_shape)
    codes = (input.float() / divisor).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    if output is None and rows == input.shape[0]:
        return codes, scale
    if output is None:
        output = torch.zeros(rows, input.shape[1], dtype=torch.float8_e4m3fn)
    output[: input.shape[0]] = codes
    if scale.shape == (input.shape[0], 1) and rows > input.shape[0]:
        scale = torch.cat([scale, torch.ones(rows - input.shape[0], 1)])
    return output, scale


def _dynamic_scale(input: Tensor, per_token: bool, upper_bound: Tensor | None) -> Tensor:
    """amax / 448 in float32: [M, 1] per token, [1] per tensor; never below MIN_SCALE."""
    magnitude = input.abs()
    amax = magnitude.amax(dim=1, keepdim=True) if per_token else magnitude.amax().reshape(1)
    amax = amax.float()
    if per_token and upper_bound is not None:
        amax = amax.clamp(max=upper_bound.float())
    return (amax / FP8_MAX).clamp_(min=MIN_SCALE)


def _spread(scale: Tensor, shape: tuple[int, int], group_shape: tuple[int, int] | None) -> Tensor:
    """The scale in a shape that broadcasts over `shape` [M, N]."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        # One value per row or per column: only the group's shape tells which (-1 means the full extent).
        assert group_shape is not None, f"a 1-D scale of {scale.numel()} values needs group_shape"
        scale = scale.unsqueeze(0 if group_shape[0] == -1 else 1)
    for dim in (0, 1):
        if scale.shape[dim] not in (1, shape[dim]):
            group = -(-shape[dim] // scale.shape[dim])
            scale = scale.repeat_interleave(group, dim=dim).narrow(dim, 0, shape[dim])
    return scale
