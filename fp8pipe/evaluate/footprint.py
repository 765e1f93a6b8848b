"""What a model takes on the devices that serve it: weights, and the KV cache of one sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.machine.fit import UTILIZATION, Need
from fp8pipe.model.untrusted import parse_json

_WINDOWED = ("sliding_attention", "chunked_attention")
_FULL = "full_attention"


def need_of(model: str, weights: int, config: Mapping[str, Any], engine: Mapping[str, Any]) -> Need:
    """What an engine with these vLLM arguments must hold to serve a model of `weights` bytes with this config.json.

    What the config does not say counts as nothing, so that the answer is a floor. model: its name, for messages.
    """
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    context = _number(engine, "max_model_len") or _number(text, "max_position_embeddings")
    fp8 = str(engine.get("kv_cache_dtype", "auto")).startswith("fp8")
    return Need(
        model=model,
        weights=weights,
        kv_cache=_cached_numbers(text, context) * (1 if fp8 else 2),
        context=context,
        fp8_cache=fp8,
        gpus=math.prod(_number(engine, f"{name}_parallel_size") or 1 for name in ("tensor", "pipeline")),
        utilization=float(engine.get("gpu_memory_utilization") or UTILIZATION),
    )


def need_for(request: EvalRequest) -> Need:
    """What the request's engine must hold: the safetensors files of the folder, and its cache."""
    folder = Path(request.model)
    config, _ = parse_json((folder / "config.json").read_bytes(), constants=True)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    settings = request.engine | request.reduced
    return need_of(request.model_id, weights, config if isinstance(config, dict) else {}, settings)


def _cached_numbers(text: Mapping[str, Any], context: int) -> int:
    """How many numbers all layers cache for one sequence of `context` tokens.

    A layer caches K and V of each KV head for every token, or for those of its window; latent attention (MLA) one
    latent and one rotated key; a recurrent layer none.
    """
    if latent := _number(text, "kv_lora_rank"):
        each = latent + _number(text, "qk_rope_head_dim")
    else:
        heads = _number(text, "num_attention_heads")
        size = _number(text, "head_dim") or (_number(text, "hidden_size") // heads if heads else 0)
        each = 2 * (_number(text, "num_key_value_heads") or heads) * size
    kinds = text.get("layer_types")
    if not isinstance(kinds, list):
        kinds = [_FULL] * _number(text, "num_hidden_layers")
    window = _number(text, "sliding_window") or _number(text, "attention_chunk_size") or context
    tokens = {_FULL: context} | dict.fromkeys(_WINDOWED, min(window, context))
    return each * sum(tokens.get(str(kind), 0) for kind in kinds)


def _number(values: Mapping[str, Any], name: str) -> int:
    """A natural number, or 0 if there is none of this name."""
    value = values.get(name)
    return value if isinstance(value, int) and value > 0 else 0
