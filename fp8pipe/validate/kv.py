"""Scales of the KV cache: all there, announced, in their places (check K7).

In: a Subject, headers only. vLLM uses 1.0 for what it does not find, without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fp8pipe.validate.coverage import is_of_source
from fp8pipe.validate.findings import Fault, check
from fp8pipe.validate.layout import KV_SCALES, Layout, attention_of, split_name

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

_PLACE = re.compile(r"\.(self_attn|attn|attention|self_attention|mixer)(\.attn|\.[qkv]_proj|\.qkv_proj)?$")
"""Modules whose KV scales vLLM maps to the attention layer above them."""


def _layout(subject: Subject) -> Layout:
    assert subject.layout is not None
    return subject.layout


@check(
    "K7",
    "Every attention layer has its KV scales if the scheme says so, and none otherwise.",
    needs=("scheme",),
    consequence="vLLM uses 1.0 for a missing KV scale and ignores one that is not announced, without a word",
    remedy="calibrate the KV cache again, or set kv_cache_scheme",
)
def kv_scales_are_complete(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None
    present = kv_scales(subject)
    if subject.scheme.kv is not None:
        yield from _missing_kv(subject, present)
    yield from _misplaced_kv(subject, present)


def kv_scales(subject: Subject) -> dict[str, str]:
    """KV scale tensors by name, with the attention module they belong to as vLLM maps them."""
    found = {}
    for name in subject.shelf.tensors:
        module, leaf = split_name(name)
        if leaf in KV_SCALES and not is_of_source(subject, name):
            found[name] = re.sub(r"\.(attn|[qkv]_proj|qkv_proj)$", "", module) if _PLACE.search(module) else module
    return found


def _missing_kv(subject: Subject, present: dict[str, str]) -> Iterator[Fault]:
    have = {(module, split_name(name)[1]) for name, module in present.items()}
    for module in _layout(subject).attention:
        for leaf in ("k_scale", "v_scale"):
            if (
                (module, leaf) not in have
                and not subject.shelf.has(f"{module}.{leaf}")
                and (module, "kv_scale") not in have
            ):
                yield Fault("the KV scale", "missing", tensor=f"{module}.{leaf}")


def _misplaced_kv(subject: Subject, present: dict[str, str]) -> Iterator[Fault]:
    assert subject.scheme is not None
    layout = _layout(subject)
    attention = {*layout.attention, *filter(None, map(attention_of, layout.optional))}
    for name, module in present.items():
        file = subject.shelf.tensors[name].shard
        if module not in attention:
            yield Fault("a KV scale of an attention layer", "no such layer", file, name, consequence="vLLM stops")
        elif split_name(name)[1] == "kv_scale":
            yield _legacy_kv(subject, file, name)
    silent = subject.scheme.kv is None and any(module in attention for module in present.values())
    if silent:
        first = next(iter(sorted(present)))
        yield _unannounced_kv(subject, subject.shelf.tensors[first].shard, f"{len(present)} KV scales, first {first}")


def _legacy_kv(subject: Subject, file: str, name: str) -> Fault:
    """One scale for both, of early AutoFP8: fine in quant_method fp8, half lost in compressed-tensors."""
    assert subject.scheme is not None
    is_fp8 = subject.scheme.method == "fp8"
    return Fault(
        "k_scale and v_scale",
        "the deprecated kv_scale",
        file,
        name,
        severity="warning" if is_fp8 else "error",
        consequence="vLLM uses it for both, with a warning" if is_fp8 else "vLLM keeps 1.0 for v, without a word",
        remedy="write it as k_scale and v_scale",
    )


def _unannounced_kv(subject: Subject, file: str, found: str) -> Fault:
    """The fp8 method has no key to announce them: they need --kv-cache-dtype fp8."""
    assert subject.scheme is not None
    if subject.scheme.method == "fp8":
        return Fault(
            "a config that announces the KV scales",
            found,
            file,
            severity="warning",
            consequence="vLLM uses them only with --kv-cache-dtype fp8, and 1.0 otherwise",
            remedy="serve with --kv-cache-dtype fp8, or write compressed-tensors with kv_cache_scheme",
        )
    return Fault("kv_cache_scheme in config.json", found, file, severity="warning")
