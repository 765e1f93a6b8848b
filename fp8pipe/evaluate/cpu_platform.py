"""vLLM plugin `fp8pipe_cpu`: FP8 on vLLM's CPU platform as its GPU kernels mean it, and MLA's positions put right.

vLLM's CPU build declares FP8 and serves part of it: the operation behind `vllm._custom_ops.scaled_fp8_quant` is a
placeholder, a fused activation kernel is missing, and there are kernels for block weights and FP8 experts on CPUs with
AMX only, where most of them leave activations in 16 bits. `register` supplies what is missing in torch, under names
that begin with `Reference`, so that a verdict on a CPU is one on W8A8, and the same on every CPU. Semantics come before
speed. On any other platform `register` does nothing. vLLM calls it in every process, through the entry point in
`vllm.general_plugins`; importing this module costs nothing but the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

NAME = "fp8pipe_cpu"
"""The entry point's name; `VLLM_PLUGINS` may leave it out."""


def register() -> None:
    """Entry point: supply what the CPU platform lacks; a no-op elsewhere, and when called again."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or active():
        return
    _supply_operations()
    _supply_linear_kernels()
    _supply_experts()
    _correct_rotary_embedding()


def active() -> bool:
    """Whether this process serves FP8 through the kernels of this plugin."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS.get(PlatformEnum.CPU, ())
    return any(kernel.__module__.startswith("fp8pipe.") for kernel in kernels)


def _supply_operations() -> None:
    """`scaled_fp8_quant` in torch; SiluAndMul and quantization as two steps, where there is no fused kernel."""
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fusion import fused_act_quant
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    from fp8pipe.evaluate.cpu.quantize import scaled_fp8_quant

    # A placeholder's schema takes no argument. A build that has the real op keeps it.
    if not torch.ops._C.static_scaled_fp8_quant.default._schema.arguments:
        _custom_ops.scaled_fp8_quant = scaled_fp8_quant
    if not hasattr(torch.ops._C, "silu_and_mul_quant"):
        fused_act_quant._FUSED_ACT_QUANT.pop((SiluAndMul, kFp8StaticTensorSym), None)


def _supply_linear_kernels() -> None:
    """Block weights and weight-only FP8; what vLLM would serve as W8A16 instead of W8A8 is taken out of its choice."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    from fp8pipe.evaluate.cpu.linear import ReferenceFp8BlockScaledMMLinearKernel, ReferenceFp8W8A16LinearKernel

    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].insert(0, ReferenceFp8BlockScaledMMLinearKernel)
    linear._POSSIBLE_WFP8A16_KERNELS[PlatformEnum.CPU].append(ReferenceFp8W8A16LinearKernel)
    per_tensor = linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU]
    per_tensor[:] = [kernel for kernel in per_tensor if kernel.__name__ != "CPUFp8PerTensorScaledMMLinearKernel"]


def _supply_experts() -> None:
    """FP8 experts under vLLM's backend EMULATION, which keeps them as loaded and has no kernel for these schemes."""
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
    """Queries as MLA gives them, [tokens, heads, features], go through vLLM's torch implementation.

    The CPU operation takes their heads for tokens and rotates by wrong positions, in every dtype and without an error.
    Models whose rotary embedding has a class of its own, as with DeepSeek's own YaRN, were never affected.
    """
    from vllm.model_executor.layers.rotary_embedding import base

    operation = base.RotaryEmbedding.forward_cpu

    def forward_cpu(
        self: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return (operation if query.ndim == 2 else base.RotaryEmbedding.forward_native)(self, positions, query, key)

    base.RotaryEmbedding.forward_cpu = forward_cpu
