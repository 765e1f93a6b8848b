"""The checkpoint's tensors: which ones a choice makes, how the format spells them, and where their bytes lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fp8pipe.config import Recipe
from fp8pipe.errors import ConfigError, InputError, UnsupportedArchitecture
from fp8pipe.model.architecture import Architecture, AttentionLayer, TensorRole
from fp8pipe.model.headers import SINGLE_NAME, Headers, TensorInfo, lay_out
from fp8pipe.quantize import formats
from fp8pipe.quantize.plan.choose import Choice, experts_holder
from fp8pipe.quantize.plan.record import FP8, OutputTensor, Role, Slice

_NEVER_LINEAR = frozenset(("embedding", "norm", "conv", "bias"))
"""Kinds that no loader takes for a Linear: the ignore list need not name them."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An output tensor before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    role: Role
    source: str
    slice: Slice | None = None
    group: str = ""


def output_tensors(
    headers: Headers, recipe: Recipe, architecture: Architecture, choices: Mapping[str, Choice]
) -> tuple[OutputTensor, ...]:
    """Every tensor of the checkpoint with its place, in the order of shards and bytes."""
    drafts = list(_drafts(headers, recipe, architecture, choices))
    drafts += _kv_drafts(headers, recipe, architecture)
    return _place(headers, drafts)


def file_sizes(outputs: Iterable[OutputTensor]) -> dict[str, int]:
    """Bytes of each file of the checkpoint."""
    sizes: dict[str, int] = {}
    for output in outputs:
        sizes[output.shard] = max(sizes.get(output.shard, 0), output.end)
    return sizes


# ---------------------------------------------------------------------------------------------- from choices to tensors


def _drafts(
    headers: Headers, recipe: Recipe, architecture: Architecture, choices: Mapping[str, Choice]
) -> Iterator[Draft]:
    for name, info in headers.tensors.items():
        role, choice = architecture.tensors[name], choices[name]
        if choice.action == "drop":
            continue
        if choice.action == "keep":
            dtype, kind = ("BF16", "dequantize") if choice.scale else (info.dtype, "copy")
            yield Draft(name, dtype, info.shape, info.shard, kind, name)
        elif role.kind == "fused_experts":
            yield from _expert_drafts(info, role, recipe)
        else:
            if len(info.shape) != 2 or not name.endswith(".weight"):
                raise UnsupportedArchitecture(f"{name}: a Linear of shape {list(info.shape)}, expected [out, in]")
            yield from _linear_drafts(name.removesuffix(".weight"), info.shape, info, recipe, None, role.group)


def _linear_drafts(
    module: str, shape: tuple[int, ...], info: TensorInfo, recipe: Recipe, part: Slice | None, group: str
) -> Iterator[Draft]:
    """FP8 weight, its scale and, for static activations, its input's scale."""
    spelling = formats.format_of(recipe)
    scale_name = spelling.weight_scale_name(recipe.weights.strategy)
    scale_shape = formats.weight_scale_shape(recipe, (shape[0], shape[1]))

    def draft(leaf: str, dtype: str, own_shape: tuple[int, ...], role: Role) -> Draft:
        return Draft(f"{module}.{leaf}", dtype, own_shape, info.shard, role, info.name, part, group)

    yield draft("weight", FP8, shape, "weight")
    yield draft(scale_name, "F32", scale_shape, "weight_scale")
    if recipe.activations is not None and recipe.activations.mode == "static":
        yield draft("input_scale", "F32", spelling.scalar_shape(), "input_scale")


def _expert_drafts(info: TensorInfo, role: TensorRole, recipe: Recipe) -> Iterator[Draft]:
    """Per-expert weights out of one 3-D tensor, under the names that vLLM's loaders read."""
    layout = role.layout
    assert layout is not None
    experts, rows, columns = info.shape if not layout.transposed else (info.shape[0], info.shape[2], info.shape[1])
    parts = len(layout.projections)
    holder = experts_holder(info.name, role)
    for expert in range(experts):
        group = f"{holder}.{expert}.({'+'.join(layout.projections)})" if parts > 1 else ""
        for index, projection in enumerate(layout.projections):
            start, step = (index, parts) if layout.interleaved else (index * (rows // parts), 1)
            part = Slice(expert=expert, start=start, step=step, transposed=layout.transposed)
            module = f"{holder}.{expert}.{projection}"
            yield from _linear_drafts(module, (rows // parts, columns), info, recipe, part, group)


def _kv_drafts(headers: Headers, recipe: Recipe, architecture: Architecture) -> Iterator[Draft]:
    if recipe.kv_cache is None:
        return
    if not architecture.attention:
        raise ConfigError(f"recipe {recipe.name} asks for KV scales, but the model has no attention with a KV cache")
    shape_of = formats.format_of(recipe).kv_scale_shape
    for layer in architecture.attention:
        if layer.mla:
            continue
        shape = shape_of(recipe.kv_cache.strategy, layer.num_kv_heads)
        shard = _shard_of(layer, headers)
        yield Draft(f"{layer.name}.k_scale", "F32", shape, shard, "k_scale", layer.name)
        yield Draft(f"{layer.name}.v_scale", "F32", shape, shard, "v_scale", layer.name)


def _shard_of(layer: AttentionLayer, headers: Headers) -> str:
    """The file that holds the attention's first tensor."""
    return next(info.shard for info in headers.tensors.values() if info.name.startswith(f"{layer.name}."))


# ---------------------------------------------------------------------------------------------- places


def _place(headers: Headers, drafts: Iterable[Draft]) -> tuple[OutputTensor, ...]:
    """Give every draft its bytes. Shards keep their names and tensors; a lone one gets the name that loaders expect."""
    by_shard: dict[str, list[Draft]] = {shard.name: [] for shard in headers.shards}
    for draft in drafts:
        by_shard[draft.shard].append(draft)
    return tuple(
        output
        for shard, members in by_shard.items()
        if members
        for output in _place_in(SINGLE_NAME if len(headers.shards) == 1 else shard, members)
    )


def _place_in(file: str, members: list[Draft]) -> Iterator[OutputTensor]:
    by_name = {draft.name: draft for draft in members}
    if len(by_name) < len(members):
        twice = Counter(draft.name for draft in members).most_common(1)[0][0]
        raise InputError(f"{twice}: the checkpoint would hold it twice; is the source quantized already?")
    for info in lay_out(file, [(draft.name, draft.dtype, draft.shape) for draft in members]):
        draft = by_name[info.name]
        yield OutputTensor(
            name=info.name,
            dtype=info.dtype,
            shape=info.shape,
            shard=file,
            begin=info.begin,
            end=info.end,
            role=draft.role,
            source=draft.source,
            slice=draft.slice,
            group=draft.group,
        )


# ---------------------------------------------------------------------------------------------- config.json


def quantization_config(
    headers: Headers,
    recipe: Recipe,
    architecture: Architecture,
    choices: Mapping[str, Choice],
    outputs: Iterable[OutputTensor],
) -> dict[str, Any]:
    """What config.json will say. Kept modules are named exactly, on disk and, where it differs, in transformers."""
    modules: dict[str, None] = {"lm_head": None}
    experts: dict[str, None] = {}
    for name, role in architecture.tensors.items():
        if choices[name].action != "keep" or len(headers.tensors[name].shape) < 2 or role.kind in _NEVER_LINEAR:
            continue
        if role.kind in {"expert", "fused_experts", "kept_experts"}:
            experts[experts_holder(name, role)] = None
        elif name.endswith(".weight"):
            modules[name.removesuffix(".weight")] = None
            if role.module:
                modules[role.module] = None
    with_kv = any(output.role == "k_scale" for output in outputs)
    return formats.format_of(recipe).quantization_config(recipe, list(modules), list(experts), with_kv=with_kv)
