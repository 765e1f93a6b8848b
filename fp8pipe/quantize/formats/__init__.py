"""How a scheme is written on disk: names and shapes of scales, and the quantization_config of config.json.

    compressed_tensors    what llm-compressor writes; vLLM and transformers load it
    fp8                   what AutoFP8 and DeepSeek write (quant_method: fp8); vLLM loads it
    kept                  what an ignore list names

Each of the first two modules has the functions of `Format`.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from fp8pipe.config import Recipe
from fp8pipe.quantize.formats import compressed_tensors, fp8
from fp8pipe.quantize.formats.kept import Kept, foreign_parents, kept_of

__all__ = ["Format", "Kept", "foreign_parents", "format_of", "kept_of", "weight_scale_shape"]


class Format(Protocol):
    """One spelling of a checkpoint."""

    NAME: str
    """Its quant_method."""

    def weight_scale_name(self, strategy: str) -> str:
        """Leaf name of a weight's scale."""
        ...

    def scalar_shape(self) -> tuple[int, ...]:
        """Shape of a scale that serves a whole tensor."""
        ...

    def kv_scale_shape(self, strategy: str, num_kv_heads: int) -> tuple[int, ...]:
        """Shape of k_scale and v_scale."""
        ...

    def quantization_config(self, recipe: Recipe, kept: Kept, *, with_kv: bool) -> dict[str, Any]:
        """`quantization_config` of config.json. `with_kv`: whether the checkpoint has KV scales."""
        ...

    def refuse_experts(self, recipe: Recipe) -> str | None:
        """Why vLLM cannot serve experts quantized by `recipe` in this spelling; None if it can."""
        ...


_FORMATS: dict[str, Format] = {"compressed-tensors": compressed_tensors, "fp8": fp8}  # type: ignore[dict-item] # modules


def format_of(recipe: Recipe) -> Format:
    """The spelling that `recipe` asks for."""
    return _FORMATS[recipe.checkpoint_format]


def weight_scale_shape(recipe: Recipe, shape: tuple[int, int]) -> tuple[int, ...]:
    """Shape on disk of the scale of a weight of shape [out, in]."""
    rows, columns = shape
    if recipe.weights.strategy == "channel":
        return (rows, 1)
    if recipe.weights.strategy == "block":
        block_rows, block_columns = recipe.weights.block_shape
        return (math.ceil(rows / block_rows), math.ceil(columns / block_columns))
    return format_of(recipe).scalar_shape()
