"""Decides from headers alone what becomes of every tensor: kept or quantized, why, and at which byte of which file.

In: Snapshot, Headers, Recipe, Architecture. Out: a `Plan`, saved as DIR/fp8pipe/plan.json, which fixes the checkpoint's
names, dtypes, shapes, offsets and quantization_config before the first weight is read.

    choose    which tensors are quantized, which are kept, and why
    layout    the checkpoint's tensors, their places, and quantization_config
    record    the Plan itself
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fp8pipe.config import Recipe
from fp8pipe.errors import ConfigError, MalformedCheckpoint, UnsupportedArchitecture
from fp8pipe.model.architecture import Architecture
from fp8pipe.model.fp8_source import block_shape
from fp8pipe.model.headers import Headers, TensorInfo
from fp8pipe.model.names import experts_holder
from fp8pipe.model.shards import require_disk
from fp8pipe.quantize.plan.choose import Choice, choose, unmatched_ignore
from fp8pipe.quantize.plan.layout import file_sizes, output_tensors, quantization_config
from fp8pipe.quantize.plan.record import OutputTensor, Plan, PlannedTensor, Role, Slice, SummaryRow
from fp8pipe.records import Snapshot

__all__ = [
    "OutputTensor",
    "Plan",
    "PlannedTensor",
    "Role",
    "Slice",
    "SummaryRow",
    "check_disk",
    "make_plan",
]


def make_plan(
    snapshot: Snapshot,
    headers: Headers,
    recipe: Recipe,
    architecture: Architecture,
    *,
    keep: Mapping[str, str] | None = None,
) -> Plan:
    """The plan for quantizing a model with a recipe. Pure: reads no file.

    keep: source tensors that a calibration keeps unquantized -> why; None while a recipe with `keep_bf16` is not
    calibrated yet. Raises UnmatchedEntry for an entry of targets or ignore that matches nothing, ConfigError for a
    recipe that vLLM could not serve on this model, UnsupportedArchitecture if nothing can be quantized,
    MalformedCheckpoint if tensors of the model's layers are missing or have another shape.
    """
    if recipe.needs_calibration and architecture.answered_by != "transformers":
        raise ConfigError(
            f"{snapshot.model_id}: recipe {recipe.name} measures ranges, for which transformers must run the model, "
            f"but only {architecture.answered_by} knows {architecture.model_class}; choose a recipe with dynamic "
            "activations and no KV cache scheme, such as fp8-dynamic or fp8-block"
        )
    choices = choose(headers, recipe, architecture, keep)
    if architecture.misfits:
        more = f" and {len(architecture.misfits) - 3} more" if len(architecture.misfits) > 3 else ""
        raise MalformedCheckpoint(
            f"{snapshot.model_id}: {'; '.join(architecture.misfits[:3])}{more}: the weights do not fit config.json "
            f"({architecture.model_class}); correct config.json, or download the model again"
        )
    if not any(choice.action == "quantize" for choice in choices.values()):
        reasons = sorted({choice.reason for choice in choices.values()})
        raise UnsupportedArchitecture(
            f"{snapshot.model_id}: recipe {recipe.name} quantizes none of its tensors: {'; '.join(reasons)}"
        )
    outputs = output_tensors(headers, recipe, architecture, choices)
    return Plan(
        model_id=snapshot.model_id,
        source_commit=snapshot.commit,
        recipe=recipe.name,
        settings=recipe.without_paths(),
        tensors=tuple(_planned(info, choices[info.name]) for info in headers.tensors.values()),
        outputs=outputs,
        source_block=block_shape(architecture.source_quantization),
        quantization_config=quantization_config(headers, recipe, architecture, choices, outputs),
        source_bytes=headers.nbytes,
        output_bytes=sum(file_sizes(outputs).values()),
        trust_remote_code=architecture.trust_remote_code,
        notes=(*unmatched_ignore(headers, recipe, architecture), *_notes(recipe, architecture, choices, keep)),
    )


def _planned(info: TensorInfo, choice: Choice) -> PlannedTensor:
    return PlannedTensor(
        name=info.name,
        dtype=info.dtype,
        shape=info.shape,
        shard=info.shard,
        begin=info.begin,
        end=info.end,
        action=choice.action,
        reason=choice.reason,
        scale=choice.scale,
    )


def _notes(
    recipe: Recipe, architecture: Architecture, choices: dict[str, Choice], keep: Mapping[str, str] | None
) -> tuple[str, ...]:
    notes = []
    if recipe.keep_bf16 is not None and keep is None:
        notes.append(f"keep_bf16: calibration will keep the worst {100 * recipe.keep_bf16.worst:g} % of these Linears")
    if recipe.kv_cache is not None and not all(layer.has_kv_scales for layer in architecture.attention):
        notes.append("latent attention (MLA) gets no KV scales: vLLM would drop them")
    split = {
        experts_holder(name, role)
        for name, role in architecture.tensors.items()
        if role.kind == "fused_experts" and choices[name].action == "quantize"
    }
    if unread := sorted(split.intersection(architecture.unread_experts)):
        notes.append(
            f"for vLLM only: transformers {architecture.transformers_version} has no names for the experts of this "
            f"model one by one, and would initialise them at random ({unread[0]}, {len(unread)} in all)"
        )
    if any(choice.scale for choice in choices.values()):
        notes.append("the source is FP8: its weights are dequantized and quantized again, which rounds them twice")
    return tuple(notes)


def check_disk(plan: Plan, folder: Path) -> None:
    """Raise DiskTooSmall unless the checkpoint fits on the disk of `folder`, which may already hold part of it."""
    require_disk(folder, plan.shards(), plan.output_bytes)
