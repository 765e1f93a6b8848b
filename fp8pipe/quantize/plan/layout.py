"""The checkpoint's tensors: which ones each choice makes, their names in the format, and where their bytes go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fp8pipe.config import Recipe
from fp8pipe.errors import ConfigError, InputError, UnsupportedArchitecture
from fp8pipe.model import predictor
from fp8pipe.model.architecture import Architecture, AttentionLayer, TensorRole
from fp8pipe.model.fused import mixers_matrix
from fp8pipe.model.headers import SINGLE_NAME, Headers, TensorInfo, lay_out
from fp8pipe.model.names import (
    EXPERT_KINDS,
    FP8,
    PROJECTIONS,
    experts_holder,
    experts_holder_from_name,
    kv_scale_holder,
)
from fp8pipe.quantize import formats
from fp8pipe.quantize.plan.choose import Choice
from fp8pipe.quantize.plan.record import OutputTensor, Role, Slice

_NEVER_LINEAR = frozenset(("embedding", "norm", "conv", "bias"))
"""Kinds that no loader mistakes for a Linear, so that the ignore list need not name them."""


@dataclass(frozen=True, slots=True)
class UnplacedTensor:
    """A tensor of the checkpoint before it has a place."""

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
    tensors = list(_unplaced(headers, recipe, architecture, choices))
    tensors += _kv_scales(headers, recipe, architecture)
    return _place(headers, tensors)


def file_sizes(outputs: Iterable[OutputTensor]) -> dict[str, int]:
    """Bytes of each file of the checkpoint."""
    sizes: dict[str, int] = {}
    for output in outputs:
        sizes[output.shard] = max(sizes.get(output.shard, 0), output.end)
    return sizes


# ---------------------------------------------------------------------------------------------- from choices to tensors


def _unplaced(
    headers: Headers, recipe: Recipe, architecture: Architecture, choices: Mapping[str, Choice]
) -> Iterator[UnplacedTensor]:
    for name, info in headers.tensors.items():
        role, choice = architecture.tensors[name], choices[name]
        if choice.action == "drop":
            continue
        if choice.action == "keep":
            dtype, kind = ("BF16", "dequantize") if choice.scale else (info.dtype, "copy")
            yield UnplacedTensor(name, dtype, info.shape, info.shard, kind, name)
        elif role.kind == "fused_experts":
            yield from _expert_tensors(info, role, recipe)
        else:
            if len(info.shape) != 2 or not name.endswith(".weight"):
                raise UnsupportedArchitecture(f"{name}: a Linear of shape {list(info.shape)}, expected [out, in]")
            yield from _linear_tensors(name.removesuffix(".weight"), info.shape, info, recipe, None, role.group)


def _linear_tensors(
    module: str, shape: tuple[int, ...], info: TensorInfo, recipe: Recipe, part: Slice | None, group: str
) -> Iterator[UnplacedTensor]:
    """The FP8 weight, its scale and, for static activations, the scale of its input."""
    spelling = formats.format_of(recipe)
    scale_name = spelling.weight_scale_name(recipe.weights.strategy)
    scale_shape = formats.weight_scale_shape(recipe, (shape[0], shape[1]))

    def unplaced(leaf: str, dtype: str, own_shape: tuple[int, ...], role: Role) -> UnplacedTensor:
        return UnplacedTensor(f"{module}.{leaf}", dtype, own_shape, info.shard, role, info.name, part, group)

    yield unplaced("weight", FP8, shape, "weight")
    yield unplaced(scale_name, "F32", scale_shape, "weight_scale")
    if recipe.static_activations:
        yield unplaced("input_scale", "F32", spelling.scalar_shape(), "input_scale")


def _expert_tensors(info: TensorInfo, role: TensorRole, recipe: Recipe) -> Iterator[UnplacedTensor]:
    """The per-expert weights of one 3-D tensor, under the names that vLLM's loaders read."""
    layout = role.layout
    assert layout is not None
    experts, rows, columns = info.shape if not layout.transposed else (info.shape[0], info.shape[2], info.shape[1])
    parts = len(layout.projections)
    holder, fused = experts_holder(info.name, role), PROJECTIONS[role.parameter]
    for expert in range(experts):
        group = f"{holder}.{expert}.({'+'.join(fused)})" if len(fused) > 1 else ""
        for index, projection in enumerate(layout.projections):
            start, step = (index, parts) if layout.interleaved else (index * (rows // parts), 1)
            part = Slice(expert=expert, start=start, step=step, transposed=layout.transposed)
            module = f"{holder}.{expert}.{projection}"
            yield from _linear_tensors(module, (rows // parts, columns), info, recipe, part, group)


def _kv_scales(headers: Headers, recipe: Recipe, architecture: Architecture) -> Iterator[UnplacedTensor]:
    if recipe.kv_cache is None:
        return
    if not architecture.attention:
        raise ConfigError(f"recipe {recipe.name} asks for KV scales, but the model has no attention with a KV cache")
    shape_of = formats.format_of(recipe).kv_scale_shape
    for layer in architecture.attention:
        if not layer.has_kv_scales:
            continue
        shape = shape_of(recipe.kv_cache.strategy, layer.num_kv_heads)
        shard = _shard_of(layer, headers)
        observed = layer.lender or layer.name
        holder = kv_scale_holder(layer.name)
        yield UnplacedTensor(f"{holder}.k_scale", "F32", shape, shard, "k_scale", observed)
        yield UnplacedTensor(f"{holder}.v_scale", "F32", shape, shard, "v_scale", observed)


def _shard_of(layer: AttentionLayer, headers: Headers) -> str:
    """The file with the attention's first tensor."""
    return next(info.shard for info in headers.tensors.values() if info.name.startswith(f"{layer.name}."))


# ---------------------------------------------------------------------------------------------- places


def _place(headers: Headers, tensors: Iterable[UnplacedTensor]) -> tuple[OutputTensor, ...]:
    """Give every tensor its bytes. Shards keep their names and tensors; a single shard gets the name loaders expect."""
    by_shard: dict[str, list[UnplacedTensor]] = {shard.name: [] for shard in headers.shards}
    for tensor in tensors:
        by_shard[tensor.shard].append(tensor)
    return tuple(
        output
        for shard, members in by_shard.items()
        if members
        for output in _place_in(SINGLE_NAME if len(headers.shards) == 1 else shard, members)
    )


def _place_in(file: str, members: list[UnplacedTensor]) -> Iterator[OutputTensor]:
    by_name = {tensor.name: tensor for tensor in members}
    if len(by_name) < len(members):
        twice = Counter(tensor.name for tensor in members).most_common(1)[0][0]
        raise InputError(f"{twice}: the checkpoint would hold it twice; is the source quantized already?")
    for info in lay_out(file, [(tensor.name, tensor.dtype, tensor.shape) for tensor in members]):
        tensor = by_name[info.name]
        yield OutputTensor(
            name=info.name,
            dtype=info.dtype,
            shape=info.shape,
            shard=file,
            begin=info.begin,
            end=info.end,
            role=tensor.role,
            source=tensor.source,
            slice=tensor.slice,
            group=tensor.group,
        )


# ---------------------------------------------------------------------------------------------- config.json


def quantization_config(
    headers: Headers,
    recipe: Recipe,
    architecture: Architecture,
    choices: Mapping[str, Choice],
    outputs: Iterable[OutputTensor],
) -> dict[str, Any]:
    """`quantization_config` of config.json. Kept modules are named as on disk and as in transformers."""
    modules = dict.fromkeys(["lm_head", *filter(None, [architecture.head])])  # a tied head has no tensor
    experts: dict[str, None] = {}
    quantized: dict[str, None] = {}
    for name, role in architecture.tensors.items():
        own = [module for module in (name.removesuffix(".weight"), role.module) if module]
        if choices[name].action == "quantize":
            quantized |= dict.fromkeys([experts_holder(name, role), role.module] if role.kind in EXPERT_KINDS else own)
        if choices[name].action != "keep" or len(headers.tensors[name].shape) < 2 or role.kind in _NEVER_LINEAR:
            continue
        if role.kind in EXPERT_KINDS or role.kind == "kept_experts":
            experts[experts_holder(name, role)] = None
        elif role.kind == "unused" and predictor.predictor_of(name, architecture.num_layers):
            modules |= dict.fromkeys(_names_of_predictor(name, architecture.num_layers))
        elif name.endswith(".weight"):
            modules |= dict.fromkeys([*own, *mixers_matrix(role.group)])
    with_kv = any(output.role == "k_scale" for output in outputs)
    kept = formats.kept_of(modules, experts, quantized)
    return formats.format_of(recipe).quantization_config(recipe, kept, with_kv=with_kv)


def _names_of_predictor(name: str, num_layers: int) -> tuple[str, str]:
    """The names by which vLLM asks for the module of a tensor in a layer that predicts a second token: experts are one
    module, and the layer has a number of its own."""
    module = experts_holder_from_name(name) or name.removesuffix(".weight")
    return module, predictor.renumbered(module, num_layers)
