"""quant_method: compressed-tensors, format float-quantized.

Scales: `weight_scale` [1], [out, 1] or [blocks, blocks]; `input_scale` [1]; `k_scale`, `v_scale` [1] or
[num_kv_heads, 1, 1]. All are float32 multipliers."""

from __future__ import annotations

import re
from typing import Any

from fp8pipe.config import ActivationScheme, KVCacheScheme, Recipe, WeightScheme
from fp8pipe.model.names import UE8M0
from fp8pipe.quantize.formats.kept import Kept

NAME = "compressed-tensors"
VERSION = "0.17.0"
"""Version of the compressed-tensors package whose schema this follows."""


def weight_scale_name(strategy: str) -> str:
    return "weight_scale"


def scalar_shape() -> tuple[int, ...]:
    return (1,)


def kv_scale_shape(strategy: str, num_kv_heads: int) -> tuple[int, ...]:
    return (num_kv_heads, 1, 1) if strategy == "head" else (1,)


def refuse_experts(recipe: Recipe) -> str | None:
    weights, acts = recipe.weights.strategy, recipe.activations
    if acts is None:
        return "vLLM has no kernel for experts with FP8 weights and 16-bit activations"
    if weights == "block" or (weights, acts.mode) in {("tensor", "static"), ("channel", "dynamic")}:
        return None
    return (
        "vLLM serves experts with tensor weights and static activations, channel weights and dynamic ones, or blocks; "
        f"not {weights} weights with {acts.mode} activations"
    )


def quantization_config(recipe: Recipe, kept: Kept, *, with_kv: bool) -> dict[str, Any]:
    weight_only = recipe.activations is None
    format_name = "naive-quantized" if weight_only else "float-quantized"
    group = {
        "targets": ["Linear"],
        "format": format_name,
        "weights": _weights(recipe.weights),
        "input_activations": None if recipe.activations is None else _activations(recipe.activations, recipe.weights),
        "output_activations": None,
    }
    config: dict[str, Any] = {
        "quant_method": NAME,
        "format": format_name,
        "quantization_status": "compressed",
        "version": VERSION,
        "global_compression_ratio": None,
        "config_groups": {"group_0": group},
        "ignore": [*kept.modules, *kept.patterns, *map(_experts_pattern, kept.experts)],
        "kv_cache_scheme": _kv(recipe.kv_cache) if recipe.kv_cache is not None and with_kv else None,
        "sparsity_config": {},
        "transform_config": {},
    }
    if recipe.weights.power_of_two:
        config["scale_fmt"] = UE8M0  # vLLM reads it under any quant_method, compressed-tensors skips it
    return config


def _experts_pattern(holder: str) -> str:
    """A pattern for every expert of one layer. vLLM matches it against its own names, which may begin differently."""
    start = holder.find("layers.")
    return "re:.*" + re.escape(holder[max(start, 0) :]) + r"\..*"


def _args(strategy: str, *, dynamic: bool, observer: str | None, **extra: Any) -> dict[str, Any]:  # Any: JSON values
    blank = {"group_size": None, "block_structure": None, "actorder": None}
    fixed = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic}
    return fixed | blank | extra | {"observer": observer, "observer_kwargs": {}}


def _weights(scheme: WeightScheme) -> dict[str, Any]:
    extra = {"block_structure": list(scheme.block_shape)} if scheme.strategy == "block" else {}
    return _args(scheme.strategy, dynamic=False, observer=scheme.observer, **extra)


def _activations(scheme: ActivationScheme, weights: WeightScheme) -> dict[str, Any]:
    dynamic = scheme.mode == "dynamic"
    extra = {"group_size": weights.block_shape[1]} if scheme.strategy == "group" else {}
    return _args(scheme.strategy, dynamic=dynamic, observer=None if dynamic else scheme.observer, **extra)


def _kv(scheme: KVCacheScheme) -> dict[str, Any]:
    strategy = "attn_head" if scheme.strategy == "head" else "tensor"
    return _args(strategy, dynamic=False, observer=scheme.observer)
