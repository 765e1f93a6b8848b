"""What was quantized, how, and with which data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from fp8pipe.config import Recipe, dataset_name
from fp8pipe.progress import human_bytes
from fp8pipe.release.card.facts import CardFacts

if TYPE_CHECKING:
    from fp8pipe.quantize.plan import SummaryRow
    from fp8pipe.records.calibration import Calibration


_WEIGHTS = {"tensor": "one scale per tensor", "channel": "one scale per output channel", "block": "one scale per block"}


_ACTIVATIONS = {
    ("static", "tensor"): "FP8 E4M3, calibrated, one scale per tensor",
    ("dynamic", "tensor"): "FP8 E4M3, dynamic, one scale per tensor",
    ("dynamic", "token"): "FP8 E4M3, dynamic, one scale per token",
    ("dynamic", "group"): "FP8 E4M3, dynamic, one scale per group of 128",
}


def describe_scheme(recipe: Recipe) -> str:
    """Weights, activations and KV cache in one line."""
    return f"weights {_weights(recipe)}; activations {_activations(recipe)}; KV cache {_kv_cache(recipe)}"


def _weights(recipe: Recipe) -> str:
    block = "x".join(map(str, recipe.weights.block_shape)) if recipe.weights.strategy == "block" else ""
    rounded = ", powers of two" if recipe.weights.power_of_two else ""
    return f"FP8 {recipe.weights.format.upper()}, {_WEIGHTS[recipe.weights.strategy]} {block}".rstrip() + rounded


def _activations(recipe: Recipe) -> str:
    acts = recipe.activations
    return "not quantized" if acts is None else _ACTIVATIONS[acts.mode, acts.strategy]


def _kv_cache(recipe: Recipe) -> str:
    if recipe.kv_cache is None:
        return "not quantized"
    return f"FP8 E4M3, calibrated, one scale per {'layer' if recipe.kv_cache.strategy == 'tensor' else 'KV head'}"


def scheme_rows(facts: CardFacts) -> list[tuple[str, str]]:
    """What the checkpoint is, and what it was made from."""
    made, source = facts.checkpoint, facts.source
    ratio = 100 * made.output_bytes / made.source_bytes
    return [
        ("source", f"{source.model_id} at {source.commit}"),
        ("weights", _weights(facts.recipe)),
        ("activations", _activations(facts.recipe)),
        ("KV cache", _kv_cache(facts.recipe)),
        ("format", facts.recipe.checkpoint_format),
        ("size", f"{human_bytes(made.source_bytes)} -> {human_bytes(made.output_bytes)} ({ratio:.1f} %)"),
        ("tensors", f"{made.quantized_tensors} quantized, {made.kept_tensors} kept"),
        ("fingerprint", made.fingerprint),
    ]


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as a file that can be used again, without paths of the machine that used it."""
    content = recipe.without_paths().model_dump(mode="json")
    if not recipe.needs_calibration:
        del content["calibration"]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_OBSERVERS = {"minmax": "static_minmax", "mse": "mse"}


def llmcompressor_recipe(recipe: Recipe, config: Mapping[str, Any]) -> str:
    """The same scheme as a recipe of llm-compressor, with the modules that `config` (config.json) names as kept. Empty
    if that has no word for it: activations cut at a percentile, or the most sensitive modules kept."""
    acts, cache = recipe.activations, recipe.kv_cache
    observers = [one.observer for one in (acts, cache) if one is not None]
    if "percentile" in observers or recipe.keep_bf16 is not None:
        return ""
    quantized = config.get("quantization_config")
    quantized = quantized if isinstance(quantized, dict) else {}
    listed = (quantized.get(key) for key in ("ignore", "modules_to_not_convert", "ignored_layers"))
    kept = next((names for names in listed if isinstance(names, list)), [])
    weights = _FP8 | {"strategy": recipe.weights.strategy, "observer": f"memoryless_{recipe.weights.observer}"}
    if recipe.weights.strategy == "block":
        weights["block_structure"] = list(recipe.weights.block_shape)
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if acts is not None:
        dynamic = acts.mode == "dynamic"
        group["input_activations"] = _FP8 | {"strategy": acts.strategy, "dynamic": dynamic}
        group["input_activations"] |= {"group_size": 128} if acts.strategy == "group" else {}
        group["input_activations"] |= {} if dynamic else {"observer": _OBSERVERS[acts.observer]}
    modifier: dict[str, Any] = {"config_groups": {"group_0": group}}
    if cache is not None:
        strategy = "attn_head" if cache.strategy == "head" else "tensor"
        scheme = _FP8 | {"strategy": strategy, "dynamic": False, "observer": _OBSERVERS[cache.observer]}
        modifier["kv_cache_scheme"] = scheme
    modifier["ignore"] = list(kept) or ["lm_head"]
    content = {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def plan_rows(summary: Sequence[SummaryRow]) -> list[dict[str, str]]:
    """One row per action and reason of the plan."""
    return [
        {
            "action": row.action,
            "what": row.reason,
            "tensors": str(row.tensors),
            "before": human_bytes(row.source_bytes),
            "after": human_bytes(row.output_bytes),
        }
        for row in summary
    ]


def calibration_rows(calibration: Calibration | None) -> list[tuple[str, str]]:
    """The calibration data; empty without calibration."""
    if calibration is None:
        return []
    return [
        ("dataset", dataset_name(calibration.dataset)),
        ("revision", calibration.dataset_revision),
        ("split", calibration.dataset_split),
        ("samples", f"{len(calibration.sample_indices):,}, {calibration.tokens:,} tokens"),
        ("longest sample", f"{calibration.max_seq_len:,} tokens"),
        ("seed", str(calibration.seed)),
        ("sha256 of the token ids", calibration.token_ids_sha256),
    ]
