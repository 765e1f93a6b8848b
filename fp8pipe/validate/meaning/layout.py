"""Which tensors play which part: what vLLM quantizes, what must stay, what it fuses, where the KV cache is.

In: the architecture record where there is one, else names and shapes alone. Out: a `Layout`.

Names alone are enough for the layer names that nearly all released models use; what they cannot tell (every tensor
that must exist, its shape) is left open, and the checks that need it do not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fp8pipe.model.fused import fused_siblings
from fp8pipe.model.headers import TensorInfo
from fp8pipe.model.names import experts_holder
from fp8pipe.validate.meaning.config import text_config
from fp8pipe.validate.meaning.names import (
    WEIGHTS,
    attention_of,
    expert_of,
    is_companion,
    is_in_predictor,
    is_in_tower,
    is_router,
    layer_of,
    module_of_weight,
    split_name,
    stays_unquantized,
)

if TYPE_CHECKING:
    from fp8pipe.model.architecture import Architecture, ExpertLayout

HEADS = ("lm_head.weight", "embed_out.weight")
"""The output head on disk, where no record names it: GPT-NeoX has the second."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One expert's Linear weight [rows, columns] inside a tensor [experts, ...] of the source."""

    tensor: str
    expert: int
    start: int
    """Row of the expert's matrix [out, in] where it begins."""
    step: int
    """Rows from one of its rows to the next: 2 where gate and up alternate."""
    rows: int
    columns: int
    transposed: bool
    """The expert's matrix is [in, out]."""


@dataclass(frozen=True)
class Layout:
    """The parts of one model, by names on disk."""

    names: frozenset[str]
    """Every tensor of the unquantized model, as far as known."""
    quantizable: tuple[str, ...]
    """Modules whose weight vLLM quantizes unless ignored: Linears and experts, without lm_head."""
    optional: frozenset[str]
    """Of them, those of layers that predict a second token: most tools leave them as they are."""
    towers: frozenset[str]
    """Of them, those beside the text decoder: some model classes of vLLM hand their towers no quantization config."""
    fused: tuple[tuple[str, ...], ...]
    """Groups that vLLM loads into one parameter."""
    routers: frozenset[str]
    """Modules that stay, yet are quantized by vLLM unless the ignore list names them."""
    attention: tuple[str, ...]
    """Modules whose keys and values vLLM caches with scales."""
    tied: bool | None
    """lm_head shares the embedding's weight; None where the config leaves it to the model class."""
    num_layers: int | None
    num_predictors: int
    """Layers that predict a second token; their numbers follow those of the decoder's layers."""
    num_experts: int | None
    """How many experts config.json says that every experts module has, of all kinds together."""
    from_record: bool
    """From the architecture record, not from names and shapes."""
    other_names: frozenset[str]
    """Transformers' names of modules, where they differ from those on disk: an ignore list may hold both."""
    pieces: Mapping[str, Piece]
    """Modules whose weight is a part of a larger tensor of the source: experts in three dimensions."""
    heads: tuple[str, ...] = HEADS
    """Names that the output head's weight may have on disk."""
    required: frozenset[str] = frozenset()
    """Tensors that the record says every checkpoint of this model has, under their unquantized names."""
    experts: Mapping[str, int] = field(default_factory=dict)
    """Experts module -> how many experts it has, where the record says so."""
    unread_experts: tuple[str, ...] = ()
    """Experts modules that transformers does not read expert by expert, where the record says so."""
    kv_heads: Mapping[str, int] = field(default_factory=dict)
    """Attention module -> heads that it caches, where the record says so."""

    @cached_property
    def modules(self) -> frozenset[str]:
        """Every module name, with all its parents: what an ignore entry may match."""
        found = set(self.other_names)
        for name in self.names:
            while "." in name:
                name = name.rsplit(".", 1)[0]
                if name in found:
                    break
                found.add(name)
        return frozenset(found)

    @cached_property
    def is_quantizable(self) -> frozenset[str]:
        return frozenset(self.quantizable)

    @cached_property
    def may_stay(self) -> frozenset[str]:
        """Modules outside the decoder, which many tools leave unquantized."""
        return self.optional | self.towers

    @cached_property
    def group_of(self) -> dict[str, tuple[str, ...]]:
        """The fused group of each of its members."""
        return {member: group for group in self.fused for member in group}


def layout_from_names(tensors: Mapping[str, TensorInfo], config: dict[str, Any]) -> Layout:
    """The layout by names and shapes, from the source's headers or, without them, the checkpoint's own."""
    names = frozenset(name for name in tensors if not is_companion(name))
    modules = {module for module in map(module_of_weight, names) if module}
    text = text_config(config) or config
    num_layers = _count(text, "num_hidden_layers", "n_layer")
    if num_layers is not None:  # LongCat counts the two attention modules of each of its num_layers
        num_layers = min(num_layers, _count(text, "num_layers") or num_layers)
    matrices = {module for module in modules if _is_matrix(module, tensors) and not stays_unquantized(module)}
    towers = frozenset(module for module in matrices if is_in_tower(module))
    optional = frozenset(module for module in matrices - towers if is_in_predictor(module, num_layers))
    decoder = {module for module in matrices - towers - optional if layer_of(f"{module}.") is not None}
    linears = tuple(sorted(decoder | optional | towers))
    return Layout(
        names=names,
        quantizable=linears,
        optional=optional,
        towers=towers,
        fused=tuple(fused_siblings(linears, names)),
        routers=frozenset(module for module in modules if is_router(module)),
        attention=tuple(sorted({place for place in map(attention_of, decoder) if place})),
        tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings")),
        num_layers=num_layers,
        num_predictors=_count(text, "num_nextn_predict_layers") or 0,
        num_experts=_num_experts(text),
        from_record=False,
        other_names=frozenset(),
        pieces={},
    )


def layout_from_architecture(
    architecture: Architecture, tensors: Mapping[str, TensorInfo], config: dict[str, Any]
) -> Layout:
    """The layout by the architecture record. `tensors`: the source's; without a source, the checkpoint's own."""
    linears, routers = [], []
    pieces: dict[str, Piece] = {}
    by_names = layout_from_names(tensors, config)
    optional, towers, required = set[str](), set[str](), set[str]()
    for name, role in architecture.tensors.items():
        module = module_of_weight(name)
        if role.kind in {"linear", "expert"} and module:
            linears.append(module)
        elif role.kind in {"router", "gate"} and module:
            routers.append(module)
        elif role.kind == "fused_experts" and role.layout and name in tensors and len(tensors[name].shape) == 3:
            pieces |= _pieces(tensors[name], experts_holder(name, role), role.layout)
        elif role.kind == "fused_experts" and role.layout and name not in tensors:
            holder = experts_holder(name, role)  # split already: the source is not at hand
            linears.extend(one for one in by_names.quantizable if (place := expert_of(one)) and place[0] == holder)
            required |= {f"{holder}.0.{projection}.weight" for projection in role.layout.projections}
            continue
        elif role.kind == "unused" and module and module in by_names.optional:
            optional.add(module)
        elif role.kind == "outside" and module and module in by_names.towers:
            towers.add(module)
        if role.kind != "unused" and not is_companion(name):
            required.add(name)
    linears.extend(pieces)
    linears.extend(optional | towers)
    return replace(
        by_names,
        names=frozenset(architecture.tensors),
        quantizable=tuple(sorted(linears)),
        optional=frozenset(optional),
        towers=frozenset(towers),
        fused=tuple(fused_siblings(linears, architecture.tensors)),
        routers=frozenset(routers),
        attention=tuple(layer.name for layer in architecture.attention if layer.has_kv_scales),
        tied=architecture.tied_embeddings,
        num_layers=architecture.num_layers,
        from_record=True,
        other_names=frozenset(
            filter(None, (architecture.head, *(role.module for role in architecture.tensors.values())))
        ),
        pieces=pieces,
        heads=tuple(name for name, role in architecture.tensors.items() if role.kind == "lm_head") or HEADS,
        required=frozenset(required),
        experts=architecture.experts,
        unread_experts=architecture.unread_experts,
        kv_heads={layer.name: layer.num_kv_heads for layer in architecture.attention},
    )


def _pieces(tensor: TensorInfo, parent: str, layout: ExpertLayout) -> dict[str, Piece]:
    """Per-expert modules of a 3-D tensor, below `parent`, as vLLM's loaders name them on disk."""
    count, rows, columns = tensor.shape
    if layout.transposed:
        rows, columns = columns, rows
    parts = len(layout.projections)
    found = {}
    for expert in range(count):
        for number, projection in enumerate(layout.projections):
            start, step = (number, parts) if layout.interleaved else (number * (rows // parts), 1)
            piece = Piece(tensor.name, expert, start, step, rows // parts, columns, layout.transposed)
            found[f"{parent}.{expert}.{projection}"] = piece
    return found


def unquantized_names(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that the model had before it was quantized, by name and shape; places and dtypes mean nothing."""
    found = {}
    for name, info in tensors.items():
        module, leaf = split_name(name)
        if leaf == "weight_packed" and info.shape:
            shape = (*info.shape[:-1], 2 * info.shape[-1])
            found[f"{module}.weight"] = replace(info, name=f"{module}.weight", shape=shape)
        elif not is_companion(name):
            found[name] = info
    return found


def _is_matrix(module: str, tensors: Mapping[str, TensorInfo]) -> bool:
    weight = next(found for leaf in WEIGHTS if (found := tensors.get(f"{module}.{leaf}")))
    return len(weight.shape) == 2


def _count(config: dict[str, Any], *keys: str) -> int | None:
    found = [config[key] for key in keys if type(config.get(key)) is int and config[key] > 0]
    return found[0] if found else None


def _num_experts(config: dict[str, Any]) -> int | None:
    """Experts of each module. `moe_num_experts` may list how many there are of each kind, or count those of one kind
    where `moe_intermediate_size` lists a width for each (Ernie 4.5 VL has experts for text and for images)."""
    count, widths = config.get("moe_num_experts"), config.get("moe_intermediate_size")
    if isinstance(count, list) and count and all(type(one) is int and one > 0 for one in count):
        return sum(count)
    if type(count) is int and count > 0 and isinstance(widths, list) and widths:
        return count * len(widths)
    return _count(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
