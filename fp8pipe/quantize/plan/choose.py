"""Which tensors are quantized and which are kept, and why: the recipe's targets and ignore, and what vLLM can serve."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from fp8pipe.config import Recipe
from fp8pipe.errors import ConfigError, InputError, UnmatchedEntry, UnsupportedArchitecture
from fp8pipe.model import fp8_source, predictor
from fp8pipe.model.architecture import QUANTIZABLE, Architecture, TensorRole
from fp8pipe.model.headers import Headers, TensorInfo
from fp8pipe.model.names import ABSORBED_LEAF, EXPERT_KINDS, FLOATS, FP8, SPENT_NAMES, experts_holder
from fp8pipe.model.patterns import Patterns
from fp8pipe.quantize import formats


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one tensor of the source."""

    action: Literal["quantize", "keep", "drop"]
    reason: str
    scale: str = ""
    """For a weight of an FP8 source: the tensor with its scales."""


def choose(
    headers: Headers, recipe: Recipe, architecture: Architecture, keep: Mapping[str, str] | None = None
) -> dict[str, Choice]:
    """A choice for every tensor of the source, by name. keep: tensors that calibration keeps unquantized -> why."""
    keep = keep or {}
    scales = _source_scales(headers, recipe, architecture)
    targets = _Entries(recipe.targets, "targets", headers, architecture)
    ignore = _Entries(recipe.ignore, "ignore", headers, architecture)
    if targets.unmatched or (ignore.unmatched and recipe.unmatched_ignore == "error"):
        at_fault = ignore.unmatched if recipe.unmatched_ignore == "error" else ()
        raise UnmatchedEntry("\n".join((*targets.unmatched, *at_fault)))
    misfits = _misfits(headers, recipe, architecture)
    cannot = {name: why for name in headers.tensors if (why := _why_not(name, headers, architecture, scales, misfits))}
    targets.require_quantizable(cannot)
    choices: dict[str, Choice] = {}
    for name in headers.tensors:
        scale = scales.get(name, "")
        if scales and name.rpartition(".")[2] in SPENT_NAMES:
            choices[name] = Choice("drop", "scale of the FP8 source")
        elif kept := _why_kept(name, cannot, ignore, targets) or keep.get(name):
            choices[name] = Choice("keep", kept, scale)
        else:
            choices[name] = Choice("quantize", _how(recipe), scale)
    _check_precision(architecture, choices)
    _check_experts(recipe, architecture, choices)
    return choices


def _how(recipe: Recipe) -> str:
    units = {
        "tensor": "tensor",
        "channel": "output channel",
        "block": "block of {}x{}".format(*recipe.weights.block_shape),
    }
    scale = "power-of-two scale" if recipe.weights.power_of_two else "scale"
    return f"Linear weight, E4M3 with one {scale} per {units[recipe.weights.strategy]}"


def _why_not(
    name: str, headers: Headers, architecture: Architecture, scales: Mapping[str, str], misfits: Mapping[str, str]
) -> str:
    """Why no recipe can quantize this tensor; empty if one can."""
    role, dtype = architecture.tensors[name], headers.tensors[name].dtype
    if role.kind == "unused" and predictor.predictor_of(name, architecture.num_layers):
        return predictor.REASON
    if role.kind not in QUANTIZABLE:
        return role.reason
    if dtype not in FLOATS and name not in scales:
        return f"its dtype is {dtype}"
    return misfits.get(name, "")


def _why_kept(name: str, cannot: Mapping[str, str], ignore: _Entries, targets: _Entries) -> str:
    if name in cannot:
        return cannot[name]
    if ignore.match(name):
        return "the recipe ignores it"
    return "" if targets.match(name) else "no target of the recipe"


def unmatched_ignore(headers: Headers, recipe: Recipe, architecture: Architecture) -> tuple[str, ...]:
    """A message for every entry of the recipe's ignore list that matches no module."""
    return _Entries(recipe.ignore, "ignore", headers, architecture).unmatched


# ---------------------------------------------------------------------------------------------- targets and ignore


class _Entries:
    """The entries of a recipe's `targets` or `ignore`. Raises ConfigError for a pattern that cannot be matched."""

    def __init__(self, entries: Collection[str], field: str, headers: Headers, architecture: Architecture) -> None:
        self._field, self._roles = field, architecture.tensors
        self._all = "Linear" in entries
        self._entries = [entry for entry in dict.fromkeys(entries) if entry != "Linear"]
        self._exact = {entry for entry in self._entries if not entry.startswith("re:")}
        self._patterns = Patterns(entry for entry in self._entries if entry.startswith("re:"))
        self._refuse_unmatchable()
        self.unmatched = tuple(self._unmatched(_module_names(headers, architecture)))
        """A message for every entry that matches no module. lm_head may be ignored in any model."""

    def _unmatched(self, modules: list[str]) -> Iterator[str]:
        left = set(self._entries) - ({"lm_head", "re:.*lm_head"} if self._field == "ignore" else set())
        for module in modules:
            if not left:  # most entries match soon, and a model may have 100 000 modules
                break
            left.difference_update(self._matching(module))
        yield from (_unmatched(entry, self._field, modules) for entry in self._entries if entry in left)

    def match(self, tensor: str) -> bool:
        """Whether an entry matches the module of `tensor`."""
        return self._all or any(map(self._matching, self._names_of(tensor)))

    def _names_of(self, tensor: str) -> Iterator[str]:
        """The names of the tensor's module, on disk and in transformers."""
        return filter(None, (tensor.removesuffix(".weight"), self._roles[tensor].module))

    def _matching(self, module: str) -> Collection[str]:
        """The entries that match a module's name."""
        found = self._patterns.matching(module)
        self._refuse_unmatchable()
        return {module, *found} if module in self._exact else found

    def _refuse_unmatchable(self) -> None:
        for entry, reason in self._patterns.refused.items():
            raise ConfigError(f"{self._field}: {entry!r} cannot be matched: {reason}; correct or simplify it")

    def require_quantizable(self, cannot: Mapping[str, str]) -> None:
        """Raise ConfigError for an entry that matches only tensors that cannot be quantized."""
        matched_by: dict[str, list[str]] = {entry: [] for entry in self._entries}
        for tensor in self._roles:
            for entry in {entry for name in self._names_of(tensor) for entry in self._matching(name)}:
                matched_by[entry].append(tensor)
        for entry, matched in matched_by.items():
            if all(tensor in cannot for tensor in matched):
                first = min(matched, key=lambda tensor: tensor.endswith(".bias"))
                raise ConfigError(
                    f"targets: {entry!r} names {first}, which cannot be quantized ({cannot[first]}); remove the entry"
                )


def _module_names(headers: Headers, architecture: Architecture) -> list[str]:
    names = {name.removesuffix(".weight") for name in headers.tensors if not name.endswith(".bias")}
    names |= {role.module for role in architecture.tensors.values() if role.module}
    return sorted(names)


def _unmatched(entry: str, field: str, modules: list[str]) -> str:
    """The message for an entry that matches no module, with the names most like it."""
    wanted = entry.removeprefix("re:")
    leaves = {name.rpartition(".")[2]: name for name in modules}
    near = difflib.get_close_matches(wanted, modules, n=3) or [
        leaves[leaf] for leaf in difflib.get_close_matches(wanted.rpartition(".")[2], list(leaves), n=3)
    ]
    hint = f"; similar names: {', '.join(near)}" if near else ""
    advice = "correct or remove the entry (an exact module name, or re: and a pattern that matches from the start)"
    return f"{field}: {entry!r} matches no module of this model{hint}; {advice}"


# ---------------------------------------------------------------------------------------------- what vLLM can serve


def _misfits(headers: Headers, recipe: Recipe, architecture: Architecture) -> dict[str, str]:
    """Linears that vLLM cannot serve quantized under this recipe: tensor -> why."""
    misfits: dict[str, str] = {}
    if recipe.weights.strategy == "block":
        misfits |= _block_misfits(headers, recipe.weights.block_shape[0], architecture)
    if recipe.static_activations:
        for name, role in architecture.tensors.items():
            if role.kind == "linear" and name.endswith(f".{ABSORBED_LEAF}.weight"):
                misfits[name] = f"MLA {ABSORBED_LEAF}: vLLM runs an identity through it, which a static scale clips"
    return misfits


def _block_misfits(headers: Headers, height: int, architecture: Architecture) -> dict[str, str]:
    """Linears whose shards do not fit blocks `height` rows high: tensor -> why.

    vLLM cuts fused matrices at shard boundaries, so every shard but the last, and both halves of an expert, must be
    whole blocks high. Measured: otherwise its loader raises, or silently reads scales of the neighbouring shard."""
    groups: dict[str, list[str]] = defaultdict(list)
    layers: dict[str, list[str]] = defaultdict(list)
    misfits: dict[str, str] = {}
    for name, role in architecture.tensors.items():
        if role.kind in EXPERT_KINDS:
            layers[experts_holder(name, role)].append(name)
        elif role.group:
            groups[role.group].append(name)
        elif role.parts and any(part % height for part in role.parts[:-1]):
            misfits[name] = f"its shards of {list(role.parts)} rows do not begin at blocks of {height}"
    for group, members in groups.items():
        ordered = sorted(members, key=lambda name: group.index(name.removesuffix(".weight").rpartition(".")[2]))
        rows = [headers.tensors[name].shape[0] for name in ordered]
        if any(count % height for count in rows[:-1]):
            misfits |= dict.fromkeys(members, f"fused shards of {rows} rows do not begin at blocks of {height}")
    for members in layers.values():
        width = min(_intermediate(headers.tensors[name], architecture.tensors[name]) for name in members)
        if width % height:
            misfits |= dict.fromkeys(members, f"experts {width} wide are not whole blocks of {height}")
    return misfits


def _intermediate(info: TensorInfo, role: TensorRole) -> int:
    """Width of an expert between its two layers, as this tensor has it."""
    down = role.parameter == "down_proj"
    if role.layout is None:
        return info.shape[1] if down else info.shape[0]
    rows, columns = info.shape[1:] if not role.layout.transposed else (info.shape[2], info.shape[1])
    return columns if down else rows // len(role.layout.projections)


def _check_precision(architecture: Architecture, choices: Mapping[str, Choice]) -> None:
    """Raise ConfigError unless all weights that vLLM fuses have the same precision."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, role in architecture.tensors.items():
        if role.group:
            groups[role.group].append(name)
        if role.kind in EXPERT_KINDS:
            groups[f"experts of {experts_holder(name, role)}"].append(name)
    for group, members in groups.items():
        kept = [name for name in members if choices[name].action == "keep"]
        if kept and len(kept) < len(members):
            quantized = next(name for name in members if name not in kept)
            raise ConfigError(
                f"{group}: vLLM fuses these weights, so they need one precision; {kept[0]} would be kept "
                f"({choices[kept[0]].reason}), {quantized} quantized; target or ignore them together"
            )


def _check_experts(recipe: Recipe, architecture: Architecture, choices: Mapping[str, Choice]) -> None:
    """Raise ConfigError if experts are quantized by a scheme that vLLM has no kernel for."""
    quantized = (name for name, choice in choices.items() if choice.action == "quantize")
    if any(architecture.tensors[name].kind in EXPERT_KINDS for name in quantized):
        refusal = formats.format_of(recipe).refuse_experts(recipe)
        if refusal:
            raise ConfigError(f"recipe {recipe.name}: {refusal}; choose another recipe, or ignore the experts")


# ---------------------------------------------------------------------------------------------- FP8 sources


def _source_scales(headers: Headers, recipe: Recipe, architecture: Architecture) -> dict[str, str]:
    """FP8 weight of the source -> the tensor with its scales; empty for an unquantized source."""
    settings = architecture.source_quantization
    weights = [name for name, info in headers.tensors.items() if info.dtype == FP8 and name.endswith(".weight")]
    if settings is None and not weights:
        return {}
    method = (settings or {}).get("quant_method")
    if method != "fp8":
        raise UnsupportedArchitecture(
            f"the source is quantized already (quant_method {method}); start from the unquantized model"
        )
    if recipe.fp8_source == "refuse":
        raise InputError(
            "the source is FP8 already; start from the unquantized model, or set fp8_source: requantize in the recipe "
            "to dequantize and quantize it again, which rounds it twice"
        )
    block = fp8_source.block_shape(settings)
    codes = [info for info in headers.tensors.values() if fp8_source.holds_codes(info)]
    return {info.name: fp8_source.require_scale(info, headers.tensors, block).name for info in codes}
