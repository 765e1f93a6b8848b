"""What was quantized, how, and with which data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
