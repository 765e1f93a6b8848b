"""vLLM plugin `fp8pipe_cpu`: makes FP8 on vLLM's CPU platform compute what a GPU computes, and fixes MLA's positions.

vLLM's CPU build declares FP8 but serves only part of it. The operation behind `vllm._custom_ops.scaled_fp8_quant` is a
placeholder, and a fused activation kernel is missing. Block weights and FP8 experts have kernels on CPUs with AMX only,
and most of those leave activations in 16 bits. `register` supplies what is missing in torch, under names that begin
with `Reference`, so that a CPU measures W8A8, and every CPU the same. Correctness comes before speed.

On any other platform `register` supplies nothing. vLLM calls it in every process, through the entry point in
`vllm.general_plugins`; in those of an evaluation it also has loaded weights noted for the module proof. Importing this
module imports only the standard library.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

NAME = "fp8pipe_cpu"
"""Name of the entry point, which the user's VLLM_PLUGINS may exclude."""

NOTES_WEIGHTS = "FP8PIPE_NOTES_WEIGHTS"
"""Environment variable that the processes of an evaluation have."""


def register() -> None:
    """Entry point: supply what the CPU platform lacks. Does nothing elsewhere, or when called again."""
    from vllm.platforms import current_platform

    if os.environ.get(NOTES_WEIGHTS):
        from fp8pipe.evaluate.stored_weights import watch_loading

        watch_loading()

    if not current_platform.is_cpu() or active():
        return
    _supply_operations()
    _supply_linear_kernels()
    _supply_experts()
    _correct_rotary_embedding()


def active() -> bool:
    """Whether this process serves FP8 with the kernels of this plugin."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS.get(PlatformEnum.CPU, ())
    return any(kernel.__module__.startswith("fp8pipe.") for kernel in kernels)


def _supply_operations() -> None:
    """Supply `scaled_fp8_quant` in torch, and split SiluAndMul and quantization where there is no fused kernel."""
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fusion import fused_act_quant
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    from fp8pipe.evaluate.cpu.quantize import scaled_fp8_quant

    # The schema of a placeholder has no arguments. A build with the real operation keeps it.
    if not torch.ops._C.static_scaled_fp8_quant.default._schema.arguments:
        _custom_ops.scaled_fp8_quant = scaled_fp8_quant
    if not hasattr(torch.ops._C, "silu_and_mul_quant"):
        fused_act_quant._FUSED_ACT_QUANT.pop((SiluAndMul, kFp8StaticTensorSym), None)


def _supply_linear_kernels() -> None:
    """Supply block weights, weight-only FP8, and W8A8 in the place of two that compute it slowly and one that serves it
    as W8A16. On a CPU that multiplies FP8 itself, vLLM's own W8A8 kernel stays first."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    from fp8pipe.evaluate.cpu import linear as reference

    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].insert(0, reference.ReferenceFp8BlockScaledMMLinearKernel)
    linear._POSSIBLE_WFP8A16_KERNELS[PlatformEnum.CPU].append(reference.ReferenceFp8W8A16LinearKernel)
    w8a8 = linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU]
    native = [kernel for kernel in w8a8 if kernel.__name__ == "CPUFP8W8A8ScaledMMLinearKernel"]
    w8a8[:] = [*native, reference.ReferenceFp8W8A8LinearKernel]


def _supply_experts() -> None:
    """Supply FP8 experts through vLLM's backend EMULATION, which leaves weights as loaded and lacks these schemes."""
    from vllm.model_executor.layers.fused_moe.oracle import fp8

    from fp8pipe.evaluate.cpu.experts import ReferenceFp8Experts

    emulation, kernels_of, priorities = (
        fp8.Fp8MoeBackend.EMULATION,
        fp8.backend_to_kernel_cls,
        fp8._get_priority_backends,
    )
    fp8.backend_to_kernel_cls = lambda backend: [ReferenceFp8Experts] if backend is emulation else kernels_of(backend)
    fp8._get_priority_backends = lambda *scheme: [emulation, *priorities(*scheme)]


def _correct_rotary_embedding() -> None:
    """Send MLA's queries, which are [tokens, heads, features], through vLLM's torch implementation.

    The CPU operation mistakes their heads for tokens and rotates by wrong positions, in every dtype and without an
    error. Models with a rotary embedding class of their own, such as DeepSeek's YaRN, are not affected.
    """
    from vllm.model_executor.layers.rotary_embedding import base

    operation = base.RotaryEmbedding.forward_cpu

    def forward_cpu(
        self: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return (operation if query.ndim == 2 else base.RotaryEmbedding.forward_native)(self, positions, query, key)

    base.RotaryEmbedding.forward_cpu = forward_cpu
