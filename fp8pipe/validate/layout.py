"""Which tensors play which part: what vLLM quantizes, what must stay, what it fuses, where the KV cache is.

In: the architecture record where there is one, else names and shapes alone. Out: a `Layout`.

Names alone are enough for the layer names that nearly all released models use; what they cannot tell (every tensor
that must exist, its shape) is left open, and the checks that need it do not run.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fp8pipe.checkpoint import TensorInfo

if TYPE_CHECKING:
    from fp8pipe.architecture import Architecture, ExpertLayout

FUSED_BY_VLLM = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Sibling projections that vLLM loads into one parameter."""

HEADS = ("lm_head.weight", "embed_out.weight")
"""The output head on disk, where no record names it: GPT-NeoX has the second."""

MAX_COUNT = 4096
"""More layers or experts than any model has: a number beyond it is not believed."""

SCALES = (
    *("weight_scale", "weight_scale_inv", "input_scale"),
    *("weight_global_scale", "input_global_scale", "weight_scale_2"),
    *("act_scale", "activation_scale"),
)
"""Leaf names of what stands beside a quantized weight, right or wrong."""
UNWANTED = ("weight_zero_point", "input_zero_point", "weight_g_idx", "g_idx", "weight_shape")
"""The same, of schemes that vLLM's FP8 layers have no place for."""
KV_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale")
WEIGHTS = ("weight", "weight_packed")
"""Leaf names of the weight itself."""

_STAYS = re.compile(
    r"(^|\.)(embed\w*|wte|wpe|shared|lm_head|score|classifier|\w*norm\w*|\w*router\w*|gate|shared_expert_gate|conv\w*|"
    r"in_proj_ba|in_proj_a|in_proj_b|x_proj|dt_proj|weights_proj|patch_embed\w*|rel\w*|visual|vision\w*|\w*projector|mtp)(\.|$)"
)
"""Parts of a module name that mean: not an FP8 Linear in vLLM."""
_ROUTER = re.compile(r"\.(gate|\w*router\w*|shared_expert_gate)$")
_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)$")
_ATTENTION = re.compile(r"^(.*\.(?:self_attn|attn|attention|self_attention))\.[kv]_proj$")


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
    fused: tuple[tuple[str, ...], ...]
    """Groups that vLLM loads into one parameter."""
    routers: frozenset[str]
    """Modules that stay, yet are quantized by vLLM unless the ignore list names them."""
    attention: tuple[str, ...]
    """Modules whose keys and values vLLM caches with scales."""
    tied: bool | None
    """lm_head shares the embedding's weight; None where the config leaves it to the model class."""
    num_layers: int | None
    num_experts: int | None
    from_record: bool
    """From the architecture record, not from names and shapes."""
    other_names: frozenset[str]
    """Transformers' names of modules, where they differ from those on disk: an ignore list may hold both."""
    pieces: Mapping[str, Piece]
    """Modules whose weight is a part of a larger tensor of the source: experts in three dimensions."""
    heads: tuple[str, ...] = HEADS
    """Names that the output head's weight may have on disk."""

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
    def group_of(self) -> dict[str, tuple[str, ...]]:
        """The fused group of each of its members."""
        return {member: group for group in self.fused for member in group}


def layout_from_names(tensors: Mapping[str, TensorInfo], config: dict[str, Any]) -> Layout:
    """What names and shapes tell, from the source's headers or, without them, the checkpoint's own."""
    names = frozenset(name for name in tensors if not _is_companion(name))
    modules = {module for module in map(_module_of_weight, names) if module}
    linears = tuple(sorted(module for module in modules if _looks_linear(module, tensors)))
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)
    return Layout(
        names=names,
        quantizable=linears,
        fused=tuple(_fused_groups(linears)),
        routers=frozenset(module for module in modules if _ROUTER.search(module)),
        attention=tuple(sorted({match[1] for match in map(_ATTENTION.match, linears) if match})),
        tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings")),
        num_layers=_count(text, "num_hidden_layers", "n_layer"),
        num_experts=_count(text, "num_experts", "num_local_experts", "n_routed_experts"),
        from_record=False,
        other_names=frozenset(),
        pieces={},
    )


def layout_from_architecture(
    architecture: Architecture, tensors: Mapping[str, TensorInfo], config: dict[str, Any]
) -> Layout:
    """What the architecture record knows, `tensors` being the source's."""
    linears, routers = [], []
    pieces: dict[str, Piece] = {}
    for name, role in architecture.tensors.items():
        module = _module_of_weight(name)
        if role.kind in {"linear", "expert"} and module:
            linears.append(module)
        elif role.kind in {"router", "gate"} and module:
            routers.append(module)
        elif role.kind == "fused_experts" and role.layout and name in tensors and len(tensors[name].shape) == 3:
            pieces |= _pieces(tensors[name], role.layout)
    linears.extend(pieces)
    by_names = layout_from_names(tensors, config)
    return Layout(
        names=frozenset(architecture.tensors),
        quantizable=tuple(sorted(linears)),
        fused=tuple(_fused_groups(linears)),
        routers=frozenset(routers),
        attention=tuple(layer.name for layer in architecture.attention if not layer.mla),
        tied=architecture.tied_embeddings,
        heads=tuple(name for name, role in architecture.tensors.items() if role.kind == "lm_head") or HEADS,
        num_layers=architecture.num_layers,
        num_experts=by_names.num_experts,
        from_record=True,
        other_names=frozenset(role.module for role in architecture.tensors.values() if role.module),
        pieces=pieces,
    )


def _pieces(tensor: TensorInfo, layout: ExpertLayout) -> dict[str, Piece]:
    """Per-expert modules of a 3-D tensor, as vLLM's loaders name them on disk."""
    parent = tensor.name.removesuffix(".weight").rpartition(".")[0]
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


def expert_of(module: str) -> tuple[str, int, str] | None:
    """(experts module, expert index, projection) of a per-expert module."""
    match = _EXPERT.match(module)
    return (match[1], int(match[2]), match[3]) if match and len(match[2]) < 8 else None


def layer_of(name: str) -> int | None:
    """Index of the decoder layer in a name."""
    match = _LAYER.search(name)
    return int(match[2]) if match and len(match[2]) < 8 else None


def unquantized_names(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that the model had before it was quantized, by name and shape; places and dtypes mean nothing."""
    found = {}
    for name, info in tensors.items():
        module, leaf = split_name(name)
        if leaf == "weight_packed" and info.shape:
            shape = (*info.shape[:-1], 2 * info.shape[-1])
            found[f"{module}.weight"] = replace(info, name=f"{module}.weight", shape=shape)
        elif not _is_companion(name):
            found[name] = info
    return found


def _is_companion(name: str) -> bool:
    return split_name(name)[1] in {*SCALES, *KV_SCALES, *UNWANTED}


def split_name(name: str) -> tuple[str, str]:
    """Module and leaf of a tensor's name."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _module_of_weight(name: str) -> str | None:
    module, leaf = split_name(name)
    return module if module and leaf in WEIGHTS else None


def _looks_linear(module: str, tensors: Mapping[str, TensorInfo]) -> bool:
    weight = next(found for leaf in WEIGHTS if (found := tensors.get(f"{module}.{leaf}")))
    return len(weight.shape) == 2 and layer_of(module + ".") is not None and not _STAYS.search(module)


def _fused_groups(modules: Iterable[str]) -> Iterable[tuple[str, ...]]:
    siblings: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        siblings[parent].add(leaf)
    for parent, leaves in sorted(siblings.items()):
        yield from (tuple(f"{parent}.{leaf}" for leaf in group) for group in FUSED_BY_VLLM if set(group) <= leaves)


def _count(config: dict[str, Any], *keys: str) -> int | None:
    found = [config[key] for key in keys if type(config.get(key)) is int and 0 < config[key] <= MAX_COUNT]
    return found[0] if found else None
