"""Linear kernels for the FP8 schemes that vLLM's CPU platform lacks, or serves without quantizing activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import FP8ScaledMMLinearKernel, FP8ScaledMMLinearLayerConfig
from vllm.model_executor.kernels.linear.scaled_mm import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
from vllm.platforms import current_platform

from fp8pipe.evaluate.cpu.quantize import dequantize, quantize_groups

Verdict = tuple[bool, str | None]
"""Whether a kernel can serve, and if not, why."""


def _on_cpu() -> Verdict:
    return (True, None) if current_platform.is_cpu() else (False, "serves the CPU platform only")


class ReferenceFp8BlockScaledMMLinearKernel(Fp8BlockScaledMMLinearKernel):
    """DeepSeek's scheme: weights in 128x128 blocks, activations quantized dynamically in groups of 128 per token.

    Serves `quant_method: fp8` (`weight_scale_inv`) and compressed-tensors (`weight_scale`).
    """

    # vLLM's torch fallback would bound a group's scale from below 40,000 times higher than the GPU kernels do, so
    # activations are quantized where the product is computed.
    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> Verdict:
        return _on_cpu()

    def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
        """float32 [M, N] from A [M, K] in 16 bits, codes B [N, K] and scales Bs [ceil(N / 128), ceil(K / 128)]."""
        group = self.config.activation_quant_key.scale.group_shape.col
        block = (self.weight_group_shape.row, self.weight_group_shape.col)
        codes, scale = quantize_groups(A, group)
        return dequantize(codes, scale, (1, group)) @ dequantize(B, Bs, block).T


class _ReferenceKernel(FP8ScaledMMLinearKernel):
    """On a CPU, for weights with one scale per tensor or per output."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> Verdict:
        return _on_cpu()

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> Verdict:
        if c.weight_quant_key.scale.group_shape == GroupShape(128, 128):
            return False, "block weights have a kernel of their own"
        return True, None


class ReferenceFp8W8A8LinearKernel(_ReferenceKernel):
    """One scale per weight or per output, and one per token or per tensor of activations; sums in float32.

    vLLM's torch kernels compute the same through `torch._scaled_mm`, which on CPUs without FP8 instructions takes
    minutes for 512 tokens and a weight of [640, 1024].
    """

    def apply_scaled_mm(
        self,
        *,
        A: Tensor,
        B: Tensor,
        out_dtype: torch.dtype,
        As: Tensor,
        Bs: Tensor,
        bias: Tensor | None,
        output_shape: list[int],
    ) -> Tensor:
        """`output_shape` from codes A [M, K] and B [K, N], and scales As, [M, 1] or one value, and Bs, [N, 1] or one.

        The codes are multiplied first and the sums scaled, as on a GPU.
        """
        output = (A.float() @ B.float()).mul_(As.reshape(-1, 1)).mul_(Bs.reshape(1, -1))
        if bias is not None:
            output += bias
        return output.to(out_dtype).view(output_shape)


class ReferenceFp8W8A16LinearKernel(_ReferenceKernel):
    """FP8 weights with activations in 16 bits (`input_activations: null`); products and sums in float32."""

    def apply_weights(
        self,
        layer: Any,  # Any: a module's parameters have no types of their own
        x: Tensor | QuantizedActivation,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x [..., K] to [..., N]; vLLM stores the codes as [K, N], with one scale per output, [N, 1]."""
        assert isinstance(x, Tensor), "a weight-only layer gets unquantized activations"
        output = x.float() @ dequantize(layer.weight.t(), layer.weight_scale).T
        return (output if bias is None else output + bias).to(self.config.out_dtype)

    def apply_scaled_mm(self, **operands: Any) -> Tensor:  # Any: vLLM's abstract method takes quantized operands
        raise AssertionError("activations are not quantized: apply_weights is the whole kernel")
