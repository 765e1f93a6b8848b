"""What runs in each of vLLM's workers: functions that `apply_model` sends there.

With tensor parallelism vLLM starts a process for each rank, which imports this module to find them: so it imports
torch alone, and vLLM, which is there already.
"""

from __future__ import annotations

from typing import Any

import torch

LOADED_BYTES = "loaded_bytes"
"""Attribute of a model on a CPU: what `weight_bytes` answered before the kernels packed the weights."""


def look_at(model: torch.nn.Module) -> dict[str, list[str]]:
    """Names of the kernels, attention backends and KV cache dtypes in use. Runs in each of vLLM's workers."""
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    kernels: set[str] = set()
    attention: set[str] = set()
    kv_cache: set[str] = set()
    for module in model.modules():
        if isinstance(module, AttentionLayerBase):  # recurrent layers and indexers too, which have no KV cache
            attention.add(module.get_attn_backend().get_name())
            kv_cache |= {str(module.kv_cache_dtype)} if hasattr(module, "kv_cache_dtype") else set()
        elif isinstance(module, MMEncoderAttention):  # in a tower: without a cache, its backend a member of an enum
            attention.add(module.attn_backend.name)
        elif name := kernel_name(module):
            kernels.add(name)
    return {"kernels": sorted(kernels), "attention": sorted(attention), "kv_cache": sorted(kv_cache)}


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones counted once; on a CPU, as they were loaded. Runs in each of
    vLLM's workers."""
    if isinstance(loaded := getattr(model, LOADED_BYTES, None), int):
        return loaded
    tensors = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def kernel_name(module: torch.nn.Module) -> str | None:
    """Class of the kernel that a quantized layer holds; if it holds none, class of its scheme or method. None for a
    layer that is not quantized.

    Kernels for experts serve several schemes under one name, so the scheme is added: `TritonExperts(fp8_w8a8)`.
    """
    method, scheme = getattr(module, "quant_method", None), getattr(module, "scheme", None)
    wrapped = getattr(method, "old_quant_method", method)  # vLLM wraps the method of experts that ranks share
    # The method of a layer in 16 bits is `Unquantized...`, or derives from one, as that of a router does.
    if method is None or any("Unquantized" in base.__name__ for base in type(wrapped).__mro__):
        return None
    for holder in (scheme, method):
        for value in vars(holder).values() if holder is not None else ():
            if hasattr(value, "fused_experts"):  # vLLM's wrapper of every expert kernel
                experts: Any = value.fused_experts  # Any: torch types every attribute of a module as a tensor or module
                config = experts.quant_config
                return f"{type(experts).__name__}({config.config_name(torch.bfloat16) or config.weight_quant_dtype})"
            if "Kernel" in type(value).__name__:
                return type(value).__name__
    return type(method if scheme is None else scheme).__name__
