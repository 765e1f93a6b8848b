"""What a model takes on the devices that serve it: weights, and the KV cache of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fp8pipe.config import EvalSuite, Parallel
from fp8pipe.errors import ConfigError
from fp8pipe.machine.fit import UTILIZATION, Need, tensor_size
from fp8pipe.machine.gpus import Gpu

_WINDOWED = ("sliding_attention", "chunked_attention")
_FULL = "full_attention"


def need_of(model: str, weights: int, config: Mapping[str, Any], engine: Mapping[str, Any]) -> Need:
    """What an engine with these vLLM arguments must hold to serve a model of `weights` bytes with this config.json.

    What the config does not say counts as nothing, so that the answer is a floor. model: its name, for messages.
    """
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    context = _number(engine, "max_model_len") or _number(text, "max_position_embeddings")
    parallel = Parallel.of(engine)
    fp8 = str(engine.get("kv_cache_dtype", "auto")).startswith("fp8")
    return Need(
        model=model,
        weights=weights,
        kv_cache=_cached_numbers(text, context) * (1 if fp8 else 2),
        context=context,
        fp8_cache=fp8,
        heads=_number(text, "num_attention_heads"),
        gpus=parallel.copy_devices,
        copies=parallel.data,
        utilization=float(engine.get("gpu_memory_utilization") or UTILIZATION),
    )


def spread(
    suite: EvalSuite, needs: Sequence[Need], gpus: Sequence[Gpu], serves: Callable[[int], bool] = lambda size: True
) -> Parallel:
    """How both sides of a suite are spread over GPUs of which they may use these: as the suite says; for `auto` over
    the fewest that hold the larger of `needs`, and over one device where there is no GPU.

    serves: whether the model can be served in a tensor-parallel size. Raises ConfigError for a pipeline on the CPU.
    """
    if suite.parallel != "auto":
        if suite.parallel.pipeline > 1 and not gpus:
            raise ConfigError(
                f"suite {suite.name}: parallel.pipeline is {suite.parallel.pipeline}; expected 1 without a GPU, "
                "because vLLM fails there at the first prompt (KeyError in its scheduler); use `tensor` or `data`"
            )
        return suite.parallel
    larger = max(needs, key=lambda need: need.weights + need.kv_cache)
    return Parallel(tensor=tensor_size(larger, gpus, serves)) if gpus else Parallel()


def spread_over(need: Need, parallel: Parallel) -> Need:
    """The same model on so many GPUs."""
    return replace(need, gpus=parallel.copy_devices, copies=parallel.data)


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
