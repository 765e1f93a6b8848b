"""Replaces names that early tools wrote by the names that vLLM reads today. Pure: Draft in, Draft out.

was                                    written by                today
act_scale                              AutoFP8 until June 2024   input_scale
kv_scale                               AutoFP8 until July 2024   k_scale and v_scale, both with its value
k_proj.k_scale, k_proj.output_scale    ModelOpt, Quark           self_attn.k_scale; the same for v and q
weight_scale_inv [], activation_scale  transformers, per tensor  weight_scale, input_scale
ignored_layers with `re:`              edited configs            exact names, the only ones that vLLM reads there
no activation_scheme                   edited configs            static if there are input scales, else dynamic
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fp8pipe.convert.draft import Draft, DraftTensor, renamed
from fp8pipe.model.names import experts_holder_from_name, kv_scale_holder
from fp8pipe.model.patterns import Patterns

_IN_PROJECTION = re.compile(r"\.(?:[kv]_proj|qk(?:qk)?v_proj|attn)\.([qkv])_scale$")
_OUTPUT = re.compile(r"\.([qkv])_proj\.output_scale$")


def migrate(draft: Draft) -> Draft:
    """The draft under current names; equal to `draft` if it has no legacy names."""
    per_tensor = draft.method == "fp8" and not draft.quantization.get("weight_block_size")
    tensors = tuple(made for tensor in draft.tensors for made in _migrated(tensor, draft, per_tensor))
    draft = replace(draft, tensors=tensors)
    return _migrated_config(draft) if draft.method == "fp8" else draft


def _migrated(tensor: DraftTensor, draft: Draft, per_tensor: bool) -> Iterator[DraftTensor]:
    of_quantized = tensor.module in draft.quantized
    if of_quantized and tensor.leaf in {"act_scale", "activation_scale"}:
        yield renamed(tensor, "input_scale")
    elif of_quantized and per_tensor and tensor.leaf == "weight_scale_inv" and tensor.is_scalar:
        yield renamed(tensor, "weight_scale")
    elif tensor.leaf == "kv_scale":
        yield renamed(tensor, "k_scale")
        yield renamed(tensor, "v_scale")
    elif match := _IN_PROJECTION.search(tensor.name) or _OUTPUT.search(tensor.name):
        yield replace(tensor, name=f"{kv_scale_holder(tensor.name[: match.start()])}.{match[1]}_scale")
    else:
        yield tensor


def _migrated_config(draft: Draft) -> Draft:
    quantization, changes = dict(draft.quantization), []
    if quantization.get("activation_scheme") is None:
        static = any(t.leaf == "input_scale" and t.module in draft.quantized for t in draft.tensors)
        quantization["activation_scheme"] = "static" if static else "dynamic"
        changes.append(f"activation_scheme: absent -> {quantization['activation_scheme']}")
    for key in ("ignored_layers", "modules_to_not_convert"):
        entries = quantization.get(key)
        if isinstance(entries, list) and any(isinstance(e, str) and e.startswith("re:") for e in entries):
            quantization[key] = _exact(entries, draft)
            changes.append(f"{key}: patterns -> exact names")
    return replace(draft, quantization=quantization, config_changes=(*draft.config_changes, *changes))


def _exact(entries: list[Any], draft: Draft) -> list[str]:
    """The entries, with each pattern replaced by the kept modules and holders of kept experts that it matches."""
    kept = {module: module for module in ("lm_head", *draft.kept)}
    for tensor in draft.tensors:
        holder = experts_holder_from_name(tensor.name)
        if holder in draft.kept_experts:
            kept[tensor.module] = holder
    names: dict[str, None] = {}
    for entry in map(str, entries):
        if entry.startswith("re:"):
            pattern = Patterns([entry])
            names |= dict.fromkeys(name for module, name in kept.items() if pattern.matches(module))
        else:
            names[entry] = None
    return list(names)
