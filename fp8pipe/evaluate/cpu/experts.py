"""FP8 experts (W8A8) on the CPU: computes what vLLM's Triton kernels compute, for every scheme that those serve."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils import quant_utils as keys
from vllm.platforms import current_platform

from fp8pipe.evaluate.cpu.quantize import dequantize, quantize_groups, scaled_fp8_quant

_SCHEMES = (
    (keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym),
    (keys.kFp8StaticTensorSym, keys.kFp8DynamicTensorSym),
    (keys.kFp8StaticTensorSym, keys.kFp8DynamicTokenSym),
    (keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym),
)
"""(weight, activation) schemes, besides blocks."""

_ACTIVATIONS: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: functional.silu,
    MoEActivation.GELU: functional.gelu,
    MoEActivation.GELU_TANH: partial(functional.gelu, approximate="tanh"),
}
"""Computed here, because on a CPU without AVX512-BF16 vLLM's own operations truncate to bf16 instead of rounding. The
E4M3 codes of the next product then differ, by 2 % of the output's norm."""


class ReferenceFp8Experts(mk.FusedMoEExpertsModular):
    """Both products of every expert, with E4M3 operands and float32 sums; the value in between has the model's dtype.

    Activations are quantized with the layer's static scale, or dynamically per tensor, per token or in groups.
    """

    @property
    def expects_unquantized_inputs(self) -> bool:
        """True: inputs are quantized here, because vLLM's input quantization for blocks is a Triton kernel."""
        return True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu()

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in _ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return not moe_parallel_config.use_ep

    @staticmethod
    def _supports_quant_scheme(weight_key: keys.QuantKey | None, activation_key: keys.QuantKey | None) -> bool:
        if weight_key is None or weight_key.dtype != keys.FP8_DTYPE:
            return False
        block = weight_key.scale.group_shape
        in_blocks = weight_key.scale.static and block.row > 1 and block.col > 1
        return (in_blocks and activation_key == keys.kFp8Dynamic128Sym) or (weight_key, activation_key) in _SCHEMES

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of two workspaces, both empty, and of the output [M, K], already summed over the chosen experts."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,  # [M, K]
        hidden_states: Tensor,  # [M, K]
        w1: Tensor,  # [E, 2N, K] codes: gate and up
        w2: Tensor,  # [E, K, N] codes
        topk_weights: Tensor,  # [M, topk]
        topk_ids: Tensor,  # [M, topk]
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """output = sum over a token's experts of weight * down(activation(gate(x), up(x)))."""
        assert expert_map is None, "expert parallelism was declined in _supports_parallel_config"
        tokens, topk = topk_ids.shape
        chosen, rows = topk_ids.flatten().unique(return_counts=True)
        runs = list(zip(chosen.tolist(), rows.tolist(), strict=True))
        order = topk_ids.flatten().argsort(stable=True)  # groups the rows of each expert

        entering = hidden_states[order // topk]
        gate_up = self._multiply(entering, self.a1_scale, w1, self.w1_scale, self.w1_bias, runs).to(entering.dtype)
        gate, up = gate_up.float().chunk(2, dim=1)
        inner = (_ACTIVATIONS[activation](gate) * up).to(entering.dtype)
        down = self._multiply(inner, a2_scale, w2, self.w2_scale, self.w2_bias, runs)

        if not apply_router_weight_on_input:
            down *= topk_weights.float().flatten()[order].unsqueeze(1)
        output.copy_(torch.empty_like(down).index_copy_(0, order, down).view(tokens, topk, -1).sum(dim=1))

    def _multiply(
        self,
        rows: Tensor,
        row_scale: Tensor | None,
        weights: Tensor,
        weight_scales: Tensor | None,
        bias: Tensor | None,
        runs: list[tuple[int, int]],
    ) -> Tensor:
        """float32 product of `rows` with the weights of their experts; `runs` lists each expert and its row count."""
        assert weight_scales is not None
        block = None if self.block_shape is None else (self.block_shape[0], self.block_shape[1])
        products = []
        for values, (expert, _) in zip(self._quantized(rows, row_scale).split([n for _, n in runs]), runs, strict=True):
            product = values @ dequantize(weights[expert], weight_scales[expert], block).T
            products.append(product if bias is None else product + bias[expert])
        return torch.cat(products)

    def _quantized(self, rows: Tensor, scale: Tensor | None) -> Tensor:
        """`rows` quantized to E4M3 and dequantized to float32."""
        if self.block_shape is not None:
            group = self.block_shape[1]
            return dequantize(*quantize_groups(rows, group), (1, group))
        return dequantize(*scaled_fp8_quant(rows, scale, use_per_token_if_dynamic=self.per_act_token_quant))
