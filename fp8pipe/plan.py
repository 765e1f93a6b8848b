"""What becomes of every tensor, decided from headers alone: kept or quantized, why, and at which byte it will lie.

In: Snapshot, Headers, Recipe, Architecture. Out: a `Plan`, pure and printable, saved as DIR/fp8pipe/plan.json. It
fixes the whole output (names, dtypes, shapes, offsets, quantization_config) before the first weight is read."""

from __future__ import annotations

import difflib
import math
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fp8pipe import formats
from fp8pipe.architecture import QUANTIZABLE, Architecture, AttentionLayer, TensorRole
from fp8pipe.checkpoint import ITEM_BYTES, SINGLE_NAME, Headers, TensorInfo, lay_out
from fp8pipe.config import Recipe
from fp8pipe.errors import ConfigError, DiskTooSmall, InputError, UnmatchedEntry, UnsupportedArchitecture
from fp8pipe.records import Record, Snapshot

FP8 = "F8_E4M3"
FLOATS = frozenset(("BF16", "F16", "F32"))
"""Dtypes that can be quantized."""

Role = Literal["copy", "weight", "weight_scale", "input_scale", "k_scale", "v_scale"]


class Slice(Record):
    """Which Linear weight [out, in] of a 3-D tensor of experts: rows start, start + step, ... of one expert."""

    expert: int
    start: int
    step: int
    transposed: bool
    """The expert's matrix is [in, out] on disk: rows of the weight are its columns."""


class OutputTensor(Record):
    """One tensor of the checkpoint, and where its bytes will lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    """Byte offset from the start of the file."""
    end: int
    role: Role
    source: str
    """The tensor it is made from; for KV scales the attention module."""
    slice: Slice | None = None
    """Which part of `source`; None for all of it."""
    group: str = ""
    """Weights of one group share their per-tensor weight_scale and their input_scale; empty: alone."""

    @property
    def module(self) -> str:
        """The module whose weight or scale this is."""
        return self.name.rpartition(".")[0]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.name, self.dtype, self.shape, self.shard, self.begin, self.end)


class PlannedTensor(Record):
    """One tensor of the source, and what becomes of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int
    action: Literal["quantize", "keep"]
    reason: str

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.name, self.dtype, self.shape, self.shard, self.begin, self.end)


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """Tensors that are treated alike for the same reason."""

    action: str
    reason: str
    tensors: int
    source_bytes: int
    output_bytes: int


class Plan(Record):
    """Every tensor of the source and of the checkpoint. `DIR/fp8pipe/plan.json`."""

    model_id: str
    source_commit: str
    recipe: str
    """The recipe's name."""
    settings: Recipe
    tensors: tuple[PlannedTensor, ...]
    """The source's tensors, in the order of its shards and bytes."""
    outputs: tuple[OutputTensor, ...]
    """The checkpoint's tensors, in the order of their shards and bytes."""
    quantization_config: dict[str, Any]
    """What config.json will say."""
    source_bytes: int
    """Size of the source's safetensors files."""
    output_bytes: int
    """Size of the checkpoint's safetensors files."""
    trust_remote_code: bool = False
    """The model's own code was run to find its architecture, and goes with the checkpoint."""
    notes: tuple[str, ...] = ()
    """What a user should know and need not act on."""

    def summary(self) -> tuple[SummaryRow, ...]:
        """Counts and bytes by action and reason, quantized first, then by size."""
        sizes: Counter[str] = Counter()
        for output in self.outputs:
            sizes[output.source] += output.end - output.begin
        rows: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for tensor in self.tensors:
            rows[tensor.action, tensor.reason].append((tensor.end - tensor.begin, sizes.pop(tensor.name, 0)))
        if sizes:
            rows["add", "k_scale and v_scale of the KV cache"] = [(0, size) for size in sizes.values()]
        made = [
            SummaryRow(action, reason, len(found), sum(before for before, _ in found), sum(after for _, after in found))
            for (action, reason), found in rows.items()
        ]
        return tuple(sorted(made, key=lambda row: (row.action != "quantize", -row.source_bytes, row.reason)))

    def calibrated_modules(self) -> tuple[str, ...]:
        """Modules whose input range the recipe needs, by name on disk; empty for dynamic activations."""
        return tuple(output.module for output in self.outputs if output.role == "input_scale")

    def calibrated_attention(self) -> tuple[str, ...]:
        """Attention modules whose KV range the recipe needs, by name on disk."""
        return tuple(output.source for output in self.outputs if output.role == "k_scale")

    def shards(self) -> dict[str, tuple[OutputTensor, ...]]:
        """File name -> its tensors, in the order of their bytes."""
        found: dict[str, list[OutputTensor]] = {}
        for output in self.outputs:
            found.setdefault(output.shard, []).append(output)
        return {name: tuple(outputs) for name, outputs in found.items()}


# ---------------------------------------------------------------------------------------------- making a plan


def make_plan(snapshot: Snapshot, headers: Headers, recipe: Recipe, architecture: Architecture) -> Plan:
    """Decide for every tensor. Pure: reads no file.

    Raises UnmatchedEntry for an entry of targets or ignore that matches nothing, ConfigError for a recipe that vLLM
    could not serve on this model, UnsupportedArchitecture when nothing can be quantized."""
    chosen = _choose(headers, recipe, architecture)
    notes: list[str] = []
    drafts = list(_drafts(headers, recipe, architecture, chosen))
    drafts += _kv_drafts(headers, recipe, architecture, notes)
    outputs = _place(headers, drafts)
    _check(headers, recipe, architecture, chosen)
    quantized = [info.name for info in headers.tensors.values() if not chosen[info.name]]
    if not quantized:
        raise UnsupportedArchitecture(f"{snapshot.model_id}: recipe {recipe.name} quantizes none of its tensors")
    return Plan(
        model_id=snapshot.model_id,
        source_commit=snapshot.commit,
        recipe=recipe.name,
        settings=recipe,
        tensors=tuple(_planned(info, recipe, chosen[info.name]) for info in headers.tensors.values()),
        outputs=outputs,
        quantization_config=_quantization_config(headers, recipe, architecture, chosen, outputs),
        source_bytes=headers.nbytes,
        output_bytes=sum(_file_sizes(outputs).values()),
        trust_remote_code=architecture.trust_remote_code,
        notes=tuple(notes),
    )


def _planned(info: TensorInfo, recipe: Recipe, kept: str) -> PlannedTensor:
    return PlannedTensor(
        name=info.name,
        dtype=info.dtype,
        shape=info.shape,
        shard=info.shard,
        begin=info.begin,
        end=info.end,
        action="keep" if kept else "quantize",
        reason=kept or f"Linear weight, E4M3 with one scale per {recipe.weights.strategy}",
    )


def check_disk(plan: Plan, folder: Path) -> None:
    """DiskTooSmall unless the checkpoint fits beside what `folder` already holds of it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    names = plan.shards()
    held = sum(path.stat().st_blocks * 512 for path in folder.glob("*") if _belongs(path.name, names))
    held += sum(path.stat().st_blocks * 512 for path in folder.glob(".*.partial") if path.is_file())
    free = shutil.disk_usage(existing).free
    if plan.output_bytes - held > free:
        raise DiskTooSmall(
            f"{folder}: the checkpoint takes {plan.output_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free some space or choose an output folder on another disk"
        )


def _belongs(name: str, names: Mapping[str, Any]) -> bool:
    return name in names


# ---------------------------------------------------------------------------------------------- choosing


def _choose(headers: Headers, recipe: Recipe, architecture: Architecture) -> dict[str, str]:
    """Tensor name -> why it is kept; empty for what is quantized."""
    targets = _Entries(recipe.targets, "targets", headers, architecture)
    ignore = _Entries(recipe.ignore, "ignore", headers, architecture)
    chosen: dict[str, str] = {}
    for name, info in headers.tensors.items():
        role = architecture.tensors[name]
        if role.kind not in QUANTIZABLE:
            chosen[name] = role.reason
        elif info.dtype not in FLOATS:
            chosen[name] = f"its dtype is {info.dtype}"
        elif ignore.match(name):
            chosen[name] = "the recipe ignores it"
        elif not targets.match(name):
            chosen[name] = "no target of the recipe"
        else:
            chosen[name] = ""
    return chosen


class _Entries:
    """Entries of targets or ignore, each proven to match a module."""

    def __init__(self, entries: Iterable[str], field: str, headers: Headers, architecture: Architecture) -> None:
        self._roles = architecture.tensors
        self._all = "Linear" in entries
        modules = _module_names(headers, architecture)
        tests = [(entry, _test(entry, field)) for entry in entries if entry != "Linear"]
        for entry, test in tests:
            if entry not in {"lm_head", "re:.*lm_head"} and not any(map(test, modules)):
                raise UnmatchedEntry(_unmatched(entry, field, modules))
        self._tests = [test for _, test in tests]

    def match(self, tensor: str) -> bool:
        """Whether an entry names the module of `tensor`, by its name on disk or in transformers."""
        names = (tensor.removesuffix(".weight"), self._roles[tensor].module)
        return self._all or any(test(name) for test in self._tests for name in names if name)


def _test(entry: str, field: str) -> Callable[[str], bool]:
    if not entry.startswith("re:"):
        return entry.__eq__
    try:
        pattern = re.compile(entry[3:])
    except re.error as error:
        raise ConfigError(f"{field}: {entry!r} is not a regular expression: {error}") from error
    return lambda name: pattern.match(name) is not None


def _module_names(headers: Headers, architecture: Architecture) -> list[str]:
    names = {name.removesuffix(".weight") for name in headers.tensors if not name.endswith(".bias")}
    names |= {role.module for role in architecture.tensors.values() if role.module}
    return sorted(names)


def _unmatched(entry: str, field: str, modules: list[str]) -> str:
    wanted = entry.removeprefix("re:")
    leaves = {name.rpartition(".")[2]: name for name in modules}
    near = difflib.get_close_matches(wanted, modules, n=3) or [
        leaves[leaf] for leaf in difflib.get_close_matches(wanted.rpartition(".")[2], list(leaves), n=3)
    ]
    hint = f"; near: {', '.join(near)}" if near else ""
    advice = "correct or remove the entry (exact module name, or re: and a pattern that matches from the start)"
    return f"{field}: {entry!r} matches no module of this model{hint}; {advice}"


def _check(headers: Headers, recipe: Recipe, architecture: Architecture, chosen: Mapping[str, str]) -> None:
    """What vLLM fuses must have one precision, and its experts a scheme that it has a kernel for."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, role in architecture.tensors.items():
        if role.group:
            groups[role.group].append(name)
        if role.kind in {"expert", "fused_experts"}:
            groups[f"experts of {_experts_holder(name, role)}"].append(name)
    for group, members in groups.items():
        kept = [name for name in members if chosen[name]]
        if kept and len(kept) < len(members):
            quantized = next(name for name in members if not chosen[name])
            raise ConfigError(
                f"{group}: vLLM fuses its weights, so they need one precision; {kept[0]} would be kept "
                f"({chosen[kept[0]]}), {quantized} quantized; target or ignore them together"
            )
    has_experts = any(
        role.kind in {"expert", "fused_experts"} and not chosen[n] for n, role in architecture.tensors.items()
    )
    refusal = formats.format_of(recipe).refuse_experts(recipe)
    if has_experts and refusal:
        raise ConfigError(f"recipe {recipe.name}: {refusal}; choose another recipe, or ignore the experts")


# ---------------------------------------------------------------------------------------------- output tensors


@dataclass(frozen=True, slots=True)
class _Draft:
    """An output tensor before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    role: Role
    source: str
    slice: Slice | None = None
    group: str = ""


def _drafts(
    headers: Headers, recipe: Recipe, architecture: Architecture, chosen: Mapping[str, str]
) -> Iterator[_Draft]:
    for name, info in headers.tensors.items():
        role = architecture.tensors[name]
        if chosen[name]:
            yield _Draft(name, info.dtype, info.shape, info.shard, "copy", name)
        elif role.kind == "fused_experts":
            yield from _expert_drafts(info, role, recipe)
        else:
            if len(info.shape) != 2 or not name.endswith(".weight"):
                raise UnsupportedArchitecture(
                    f"{name}: a Linear weight of shape {list(info.shape)}; expected [out, in]"
                )
            yield from _linear_drafts(name.removesuffix(".weight"), info.shape, info, recipe, None, role.group)


def _linear_drafts(
    module: str, shape: tuple[int, ...], info: TensorInfo, recipe: Recipe, part: Slice | None, group: str
) -> Iterator[_Draft]:
    spelling = formats.format_of(recipe)
    out_in = (shape[0], shape[1])
    scale_name = spelling.weight_scale_name(recipe.weights.strategy)
    scale_shape = formats.weight_scale_shape(recipe, out_in)
    common = {"shard": info.shard, "source": info.name, "slice": part, "group": group}
    yield _Draft(f"{module}.weight", FP8, out_in, role="weight", **common)
    yield _Draft(f"{module}.{scale_name}", "F32", scale_shape, role="weight_scale", **common)
    if recipe.activations is not None and recipe.activations.mode == "static":
        yield _Draft(f"{module}.input_scale", "F32", spelling.scalar_shape(), role="input_scale", **common)


def _expert_drafts(info: TensorInfo, role: TensorRole, recipe: Recipe) -> Iterator[_Draft]:
    """Per-expert weights out of one 3-D tensor, under the names that vLLM's loaders read."""
    layout = role.layout
    assert layout is not None
    experts, rows, columns = info.shape if not layout.transposed else (info.shape[0], info.shape[2], info.shape[1])
    parts = len(layout.projections)
    holder = _experts_holder(info.name, role)
    for expert in range(experts):
        group = f"{holder}.{expert}.({'+'.join(layout.projections)})" if parts > 1 else ""
        for index, projection in enumerate(layout.projections):
            start, step = (index, parts) if layout.interleaved else (index * (rows // parts), 1)
            part = Slice(expert=expert, start=start, step=step, transposed=layout.transposed)
            module = f"{holder}.{expert}.{projection}"
            yield from _linear_drafts(module, (rows // parts, columns), info, recipe, part, group)


def _experts_holder(name: str, role: TensorRole) -> str:
    """`model.layers.0.mlp.experts` of `model.layers.0.mlp.experts.3.up_proj.weight` or `...experts.gate_up_proj`."""
    if role.kind == "expert":
        return re.sub(rf"\.{role.expert}\.[^.]+\.weight$", "", name)
    return name.removesuffix(".weight").rpartition(".")[0]


def _kv_drafts(headers: Headers, recipe: Recipe, architecture: Architecture, notes: list[str]) -> Iterator[_Draft]:
    if recipe.kv_cache is None:
        return
    layers = [layer for layer in architecture.attention if not layer.mla]
    if len(layers) < len(architecture.attention):
        notes.append("latent attention (MLA) gets no KV scales: vLLM would drop them")
    if not architecture.attention:
        raise ConfigError(f"recipe {recipe.name} asks for KV scales, but no attention with a KV cache was found")
    shape_of = formats.format_of(recipe).kv_scale_shape
    for layer in layers:
        shape = shape_of(recipe.kv_cache.strategy, layer.num_kv_heads)
        shard = _shard_of(layer, headers)
        yield _Draft(f"{layer.name}.k_scale", "F32", shape, shard, "k_scale", layer.name)
        yield _Draft(f"{layer.name}.v_scale", "F32", shape, shard, "v_scale", layer.name)


def _shard_of(layer: AttentionLayer, headers: Headers) -> str:
    """The file that holds the attention's first tensor."""
    return next(info.shard for info in headers.tensors.values() if info.name.startswith(f"{layer.name}."))


def _place(headers: Headers, drafts: Iterable[_Draft]) -> tuple[OutputTensor, ...]:
    """Give every draft its bytes. Shards keep their names and tensors; one lone shard gets the name that loaders
    expect."""
    by_shard: dict[str, list[_Draft]] = {shard.name: [] for shard in headers.shards}
    for draft in drafts:
        by_shard[draft.shard].append(draft)
    outputs = []
    for shard, members in by_shard.items():
        if not members:
            continue
        file = SINGLE_NAME if len(headers.shards) == 1 else shard
        by_name = {draft.name: draft for draft in members}
        if len(by_name) < len(members):
            twice = Counter(draft.name for draft in members).most_common(1)[0][0]
            raise InputError(f"{twice}: the checkpoint would hold it twice; is the source quantized already?")
        for info in lay_out(file, [(draft.name, draft.dtype, draft.shape) for draft in members]):
            draft = by_name[info.name]
            outputs.append(
                OutputTensor(
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
            )
    return tuple(outputs)


def _file_sizes(outputs: Iterable[OutputTensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for output in outputs:
        sizes[output.shard] = max(sizes.get(output.shard, 0), output.end)
    return sizes


def _quantization_config(
    headers: Headers,
    recipe: Recipe,
    architecture: Architecture,
    chosen: Mapping[str, str],
    outputs: Iterable[OutputTensor],
) -> dict[str, Any]:
    modules: dict[str, None] = {"lm_head": None}
    experts: dict[str, None] = {}
    for name, role in architecture.tensors.items():
        if (
            not chosen[name]
            or len(headers.tensors[name].shape) < 2
            or role.kind in {"embedding", "norm", "conv", "bias"}
        ):
            continue
        if role.kind in {"expert", "fused_experts"}:
            experts[_experts_holder(name, role)] = None
        elif name.endswith(".weight"):
            modules[name.removesuffix(".weight")] = None
            if role.module:
                modules[role.module] = None
    with_kv = any(output.role == "k_scale" for output in outputs)
    return formats.format_of(recipe).quantization_config(recipe, list(modules), list(experts), with_kv=with_kv)


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * ITEM_BYTES[dtype]
