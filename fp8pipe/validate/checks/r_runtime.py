"""R: what the readers' own loaders make of the tensors, vLLM (R1) and transformers (R2)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fp8pipe.model.headers import TensorInfo
from fp8pipe.model.names import FP8
from fp8pipe.model.untrusted import clip
from fp8pipe.validate.checks.check import check
from fp8pipe.validate.faults import Fault
from fp8pipe.validate.meaning.config import method_of
from fp8pipe.validate.meaning.names import (
    KV_SCALES,
    WEIGHTS,
    expert_of,
    holds_codes,
    is_companion,
    is_in_predictor,
    split_name,
)
from fp8pipe.validate.subject import Subject

if TYPE_CHECKING:
    from fp8pipe.oracle.vllm import Mismatch

CONSEQUENCES = {
    "refused": "vLLM stops with this message",
    "unread": "vLLM silently drops the tensor",
    "unfilled": "vLLM silently leaves (part of) the parameter uninitialised",
    "dtype": "vLLM silently casts one dtype into the other",
    "truncated": "vLLM silently cuts off what is too long",
    "overlap": "vLLM silently lets one tensor overwrite another",
}
_SUFFIXES = ("_scale_inv", "_scale_2", "_scale")
"""Ends of the names of scales of stacked experts: `experts.gate_up_proj_scale`."""


@check(
    "R1",
    "Each tensor lands whole in a parameter of vLLM's own model, and each parameter is filled.",
    needs=("vllm",),
    consequence="vLLM stops, or serves other weights than these",
    remedy="quantize again; if the source has the same fault, vLLM does not serve this architecture as it is on disk",
)
def vllm_reads_every_tensor(subject: Subject) -> Iterator[Fault]:
    version, verdict = subject.vllm.version, subject.vllm.verdict
    assert verdict is not None
    tensors, num_layers = subject.files.tensors, subject.layout.num_layers
    losses = _losses(tensors.values(), {one.tensor for one in verdict.mismatches if one.kind == "unread"})
    for mismatch in verdict.mismatches:
        name = mismatch.tensor
        if mismatch.kind == "unread" and (name not in losses or is_in_predictor(split_name(name)[0], num_layers)):
            continue  # layers of a predictor are a model of their own, built for speculative decoding only
        fault = Fault(
            mismatch.expected,
            clip(mismatch.found, 300),
            file=tensors[name].shard if name in tensors else None,
            tensor=name or mismatch.parameter or None,
            consequence=CONSEQUENCES[mismatch.kind],
            remedy=_remedy(mismatch, subject.quantization),
        )
        yield _of_vllm(fault, version) if mismatch in verdict.in_source else fault


def _losses(tensors: Collection[TensorInfo], dropped: Collection[str]) -> set[str]:
    """Those of the `dropped` tensors without which vLLM's model is another one.

    An unquantized tensor is none (rotary buffers, heads that serving does not use): if a parameter needed it, that one
    would be unfilled. Neither are codes and scales of a weight of which vLLM reads nothing. A scale is a loss if it
    belongs to codes that are read, or to none, like those of a KV cache: vLLM then computes with another number."""
    quantized = [entry for entry in tensors if holds_codes(entry) or _is_scale(entry.name)]
    coded = {_owner(entry.name) for entry in quantized if holds_codes(entry)}
    read = {_owner(entry.name) for entry in quantized if entry.name not in dropped}
    return {
        entry.name
        for entry in quantized
        if entry.name in dropped and (_owner(entry.name) in read or _owner(entry.name) not in coded)
    }


def _is_scale(name: str) -> bool:
    return is_companion(name) or name.endswith(_SUFFIXES)


def _owner(name: str) -> str:
    """The module, or the tensor of stacked experts, that codes or a scale belong to."""
    module, leaf = split_name(name)
    if is_companion(name) or leaf in WEIGHTS:
        return module
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


def _of_vllm(fault: Fault, version: str) -> Fault:
    """The fault of a mismatch that vLLM has with the source too."""
    what = "cannot load this model at all, quantized or not" if fault.tensor is None else "does the same to the source"
    return replace(
        fault,
        consequence=f"vLLM {version} {what}",
        remedy="serve and measure it with a version of vLLM that loads the source",
    )


@check(
    "R2",
    "transformers reads the experts as well as vLLM does.",
    severity="warning",
    consequence="transformers initialises these experts at random, and only mentions missing keys; vLLM reads them",
    remedy="nothing for vLLM, which has no other names for them; do not load this checkpoint with transformers",
)
def transformers_reads_the_experts(subject: Subject) -> Iterator[Fault]:
    layout = subject.layout
    if layout.unread_experts and any(map(expert_of, subject.specs)):
        first, count = layout.unread_experts[0], len(layout.unread_experts)
        yield Fault("names of experts that transformers knows", f"none for {first} and {count - 1} more", tensor=first)


def _remedy(mismatch: Mismatch, quantization: dict[str, Any]) -> str | None:
    """What to do about KV scales that vLLM does not take, and about an ignore list that says of a layer something else
    than its weights; None for other faults."""
    if mismatch.kind in ("refused", "unread") and split_name(mismatch.tensor)[1] in KV_SCALES:
        return "vLLM keeps no scales for this attention's cache: quantize with a recipe without kv_cache"
    if mismatch.kind != "dtype" or not mismatch.asked:
        return None
    name = clip(mismatch.asked)
    if mismatch.found == FP8:
        return f"vLLM looks for {name} in the ignore list, and finds it there: remove the entry, or keep the weight"
    if method_of(quantization) == "compressed-tensors":
        entry = f"re:{re.escape(name)}$, or one pattern for all that stays around it,"
    else:
        entry = name
    return f"vLLM looks for {name} in the ignore list: add {entry} to it"
