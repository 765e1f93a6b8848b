"""Kept or quantized, and why: the recipe's targets and ignore, what the architecture forbids, what vLLM can cut."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from fp8pipe.config import Recipe
from fp8pipe.errors import ConfigError, InputError, UnmatchedEntry, UnsupportedArchitecture
from fp8pipe.model.architecture import QUANTIZABLE, Architecture, TensorRole
from fp8pipe.model.headers import Headers, TensorInfo
from fp8pipe.quantize import formats
from fp8pipe.quantize.plan.record import FP8

FLOATS = frozenset(("BF16", "F16", "F32"))
"""Dtypes that are quantized as they are."""

SCALE_NAMES = ("weight_scale_inv", "weight_scale")
SPENT_NAMES = (*SCALE_NAMES, "input_scale", "activation_scale", "k_scale", "v_scale", "kv_scale")
"""Leaf names of the scales of a source that is FP8 already."""

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
"""Dtypes that the scales of an FP8 source may have."""

_EXPERT_KINDS = frozenset(("expert", "fused_experts"))


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one tensor of the source."""

    action: Literal["quantize", "keep", "drop"]
    reason: str
    scale: str = ""
    """Tensor with the scales of an FP8 source's weight."""


def choose(
    headers: Headers, recipe: Recipe, architecture: Architecture, keep: Mapping[str, str] | None = None
) -> dict[str, Choice]:
    """A choice for every tensor, by name. keep: tensors that calibration found too sensitive -> why."""
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
    return f"Linear weight, E4M3 with one scale per {units[recipe.weights.strategy]}"


def _why_not(
    name: str, headers: Headers, architecture: Architecture, scales: Mapping[str, str], misfits: Mapping[str, str]
) -> str:
    """Why no recipe entry could have this tensor quantized; empty when one could."""
    role, dtype = architecture.tensors[name], headers.tensors[name].dtype
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
    """A line for every entry of the recipe's ignore that names no module."""
    return _Entries(recipe.ignore, "ignore", headers, architecture).unmatched


def experts_holder(name: str, role: TensorRole) -> str:
    """`model.layers.0.mlp.experts` of `model.layers.0.mlp.experts.3.up_proj.weight` or `...experts.gate_up_proj`: where
    vLLM's loaders look for `<expert>.<projection>`.

    Granite MoE has its `block_sparse_moe.input_linear.weight` beside the experts that transformers and vLLM make of
    it."""
    if role.expert is not None:
        return re.sub(rf"\.{role.expert}\.[^.]+\.weight$", "", name)
    holder = name.removesuffix(".weight").rpartition(".")[0]
    is_beside = role.module.endswith(".experts") and not holder.endswith(".experts")
    return f"{holder}.experts" if is_beside else holder


# ---------------------------------------------------------------------------------------------- targets and ignore


class _Entries:
    """Entries of targets or ignore."""

    def __init__(self, entries: Iterable[str], field: str, headers: Headers, architecture: Architecture) -> None:
        self._roles = architecture.tensors
        self._all = "Linear" in entries
        self._tests = {entry: _test(entry, field) for entry in entries if entry != "Linear"}
        self.unmatched = tuple(self._unmatched(field, _module_names(headers, architecture)))
        """What to say of every entry that names no module; lm_head may always be ignored."""

    def _unmatched(self, field: str, modules: list[str]) -> Iterator[str]:
        for entry, test in self._tests.items():
            is_head = field == "ignore" and entry in {"lm_head", "re:.*lm_head"}
            if not is_head and not any(map(test, modules)):
                yield _unmatched(entry, field, modules)

    def match(self, tensor: str) -> bool:
        """Whether an entry names the module of `tensor`."""
        return self._all or any(self._names(test, tensor) for test in self._tests.values())

    def _names(self, test: Callable[[str], bool], tensor: str) -> bool:
        """By its name on disk or in transformers."""
        return any(test(name) for name in (tensor.removesuffix(".weight"), self._roles[tensor].module) if name)

    def require_quantizable(self, cannot: Mapping[str, str]) -> None:
        """ConfigError for an entry that names nothing but tensors that cannot be quantized."""
        for entry, test in self._tests.items():
            named = [tensor for tensor in self._roles if self._names(test, tensor)]
            if all(tensor in cannot for tensor in named):
                first = min(named, key=lambda tensor: tensor.endswith(".bias"))
                raise ConfigError(
                    f"targets: {entry!r} names {first}, which cannot be quantized ({cannot[first]}); remove the entry"
                )


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


# ---------------------------------------------------------------------------------------------- what vLLM can serve


def _misfits(headers: Headers, recipe: Recipe, architecture: Architecture) -> dict[str, str]:
    """Tensor -> why vLLM cannot serve it under this recipe, although it is a Linear."""
    misfits: dict[str, str] = {}
    if recipe.weights.strategy == "block":
        misfits |= _block_misfits(headers, recipe.weights.block_shape[0], architecture)
    if recipe.activations is not None and recipe.activations.mode == "static":
        for name, role in architecture.tensors.items():
            if role.kind == "linear" and name.endswith(".kv_b_proj.weight"):
                misfits[name] = "MLA kv_b_proj: vLLM runs an identity through it, which a static scale clips"
    return misfits


def _block_misfits(headers: Headers, height: int, architecture: Architecture) -> dict[str, str]:
    """vLLM cuts fused matrices at shard boundaries: all but the last shard must be whole blocks high, and both halves
    of experts (measured: else the loader raises, or takes scales of the neighbouring shard without a word)."""
    groups: dict[str, list[str]] = defaultdict(list)
    layers: dict[str, list[str]] = defaultdict(list)
    misfits: dict[str, str] = {}
    for name, role in architecture.tensors.items():
        if role.kind in _EXPERT_KINDS:
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
    """Width of an expert between its two layers, as far as this tensor tells."""
    down = role.parameter == "down_proj"
    if role.layout is None:
        return info.shape[1] if down else info.shape[0]
    rows, columns = info.shape[1:] if not role.layout.transposed else (info.shape[2], info.shape[1])
    return columns if down else rows // len(role.layout.projections)


def _check_precision(architecture: Architecture, choices: Mapping[str, Choice]) -> None:
    """What vLLM fuses must have one precision."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, role in architecture.tensors.items():
        if role.group:
            groups[role.group].append(name)
        if role.kind in _EXPERT_KINDS:
            groups[f"experts of {experts_holder(name, role)}"].append(name)
    for group, members in groups.items():
        kept = [name for name in members if choices[name].action == "keep"]
        if kept and len(kept) < len(members):
            quantized = next(name for name in members if name not in kept)
            raise ConfigError(
                f"{group}: vLLM fuses its weights, so they need one precision; {kept[0]} would be kept "
                f"({choices[kept[0]].reason}), {quantized} quantized; target or ignore them together"
            )


def _check_experts(recipe: Recipe, architecture: Architecture, choices: Mapping[str, Choice]) -> None:
    """Experts need a scheme that vLLM has a kernel for."""
    quantized = (name for name, choice in choices.items() if choice.action == "quantize")
    if any(architecture.tensors[name].kind in _EXPERT_KINDS for name in quantized):
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
            "to dequantize and quantize it anew (a second rounding)"
        )
    block = source_block(architecture)
    codes = [info for info in headers.tensors.values() if _is_codes(info)]
    return {info.name: _scale_of(info, headers, block).name for info in codes}


def source_block(architecture: Architecture) -> tuple[int, int] | None:
    """Block shape of the scales of an FP8 source; None for scales per tensor or row. InputError if it is none."""
    block = (architecture.source_quantization or {}).get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise InputError(f"config.json: weight_block_size is {block!r}, expected two sizes such as [128, 128]")
    return block[0], block[1]


def _is_codes(info: TensorInfo) -> bool:
    return info.dtype.startswith("F8_") and info.name.rpartition(".")[2] not in SPENT_NAMES


def _scale_of(info: TensorInfo, headers: Headers, block: tuple[int, int] | None) -> TensorInfo:
    """The tensor with the scales of FP8 weight `info`, of a dtype and shape that leave no doubt what they scale."""
    if info.dtype != FP8 or len(info.shape) != 2 or not info.name.endswith(".weight"):
        raise InputError(
            f"{info.name}: {info.dtype} {list(info.shape)}; of an FP8 source only 2-D {FP8} tensors called "
            ".weight can be read; start from the unquantized model"
        )
    module = info.name.removesuffix(".weight")
    found = next(
        (headers.tensors[name] for leaf in SCALE_NAMES if (name := f"{module}.{leaf}") in headers.tensors), None
    )
    if found is None:
        raise InputError(f"{info.name}: FP8 without {' or '.join(SCALE_NAMES)}; its values cannot be known")
    rows, columns = info.shape
    if block is not None:
        shapes = [(-(-rows // block[0]), -(-columns // block[1]))]
    else:
        shapes = [(), (1,), (1, 1), (rows,), (rows, 1)]
    if found.dtype not in SCALE_DTYPES or found.shape not in shapes:
        layout = f"blocks of {list(block)}" if block is not None else "config.json has no weight_block_size"
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(
            f"{found.name}: {found.dtype} {list(found.shape)} for a weight of {list(info.shape)}, expected "
            f"{', '.join(SCALE_DTYPES)} of shape {expected} ({layout}); the source does not fit its config.json"
        )
    return found
