"""quant_method: fp8, the layout of AutoFP8 (per tensor) and DeepSeek (blocks).

Scales: `weight_scale` [] per tensor, `weight_scale_inv` [blocks, blocks] (a multiplier, despite its name);
`input_scale` []; `k_scale`, `v_scale` [1]. All are float32."""

from __future__ import annotations

from typing import Any

from fp8pipe.config import Recipe
from fp8pipe.model.names import UE8M0
from fp8pipe.quantize.formats.kept import Kept

NAME = "fp8"


def weight_scale_name(strategy: str) -> str:
    return "weight_scale_inv" if strategy == "block" else "weight_scale"


def scalar_shape() -> tuple[int, ...]:
    return ()


def kv_scale_shape(strategy: str, num_kv_heads: int) -> tuple[int, ...]:
    assert strategy == "tensor", "Recipe forbids KV scales per head in this format"
    return (1,)


def refuse_experts(recipe: Recipe) -> str | None:
    return None


def quantization_config(recipe: Recipe, kept: Kept, *, with_kv: bool) -> dict[str, Any]:
    # vLLM takes ignored_layers as exact names; a holder's name covers its experts. kv_cache_scheme is for readers only:
    # vLLM follows --kv-cache-dtype.
    assert recipe.activations is not None, "Recipe forbids weight-only in this format"
    config: dict[str, Any] = {
        "quant_method": NAME,
        "activation_scheme": recipe.activations.mode,
        "ignored_layers": [*kept.exact(), *kept.experts],
    }
    if recipe.weights.strategy == "block":
        config["weight_block_size"] = list(recipe.weights.block_shape)
    if recipe.weights.power_of_two:
        config["scale_fmt"] = UE8M0
    if recipe.kv_cache is not None and with_kv:
        config["kv_cache_scheme"] = "static"
    return config
