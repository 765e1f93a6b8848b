"""K6 and K7: what is counted. Are all layers, experts and KV scales there, and no more?"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from fp8pipe.model.names import kv_scale_holder
from fp8pipe.validate.checks.check import check
from fp8pipe.validate.checks.k_coverage import missing_companions
from fp8pipe.validate.faults import Fault
from fp8pipe.validate.meaning.names import attention_of, expert_of, place_in_decoder, split_name
from fp8pipe.validate.subject import Subject

MAX_LACKING_EXPERTS = 1000
"""So many are reported of one layer."""


@check(
    "K6",
    "Layers are numbered without gaps, and every expert of every layer is there with all its projections and scales.",
    needs=("scheme",),
    yields_to=("K5",),
    consequence="vLLM silently leaves a missing expert uninitialised and takes 1.0 for a missing scale",
    remedy="quantize again from the complete source",
)
def layers_and_experts_are_complete(subject: Subject) -> Iterator[Fault]:
    yield from _layer_gaps(subject)
    yield from _expert_gaps(subject)


def _layer_gaps(subject: Subject) -> Iterator[Fault]:
    layout = subject.layout
    if layout.num_layers is None or subject.files.blind or subject.files.lost or subject.source_or_none is not None:
        return  # a source tells by name what must be there, also where layers are not numbered as in most decoders
    expected = f"layers 0 to {layout.num_layers - 1}"
    found = _decoder_layers(subject.files.tensors)
    missing = next(layer for layer in itertools.count() if layer not in found)  # the number in config.json may be huge
    if missing < layout.num_layers:
        yield Fault(expected, f"layer {missing} has no tensor")
    extra = sorted(layer for layer in found if layer >= layout.num_layers + layout.num_predictors)
    severity = "warning" if extra and extra[0] == layout.num_layers else None
    yield from (Fault(expected, f"layer {layer}", severity=severity) for layer in extra)


def _decoder_layers(names: Iterable[str]) -> set[int]:
    return {place[0] for name in names if (place := place_in_decoder(name)) is not None}


def _expert_gaps(subject: Subject) -> Iterator[Fault]:
    layout, stored = subject.layout, _expert_modules(split_name(name)[0] for name in subject.files.tensors)
    split = (module for module, piece in layout.pieces.items() if piece.tensor not in subject.files.tensors)
    known = _expert_modules([*(split_name(name)[0] for name in layout.names | layout.required), *split])
    for holder, count in sorted(_expert_counts(subject, known.keys() | stored.keys()).items()):
        modules = [*known.get(holder, {}).values(), *stored.get(holder, {}).values()]
        projections = {split_name(module)[1] for of_one in modules for module in of_one}
        whole, lacking = set(_whole(stored.get(holder, {}))), 0
        for index in range(count):
            names = (f"{holder}.{index}.{projection}" for projection in sorted(projections))
            faults = [fault for name in names for fault in _missing_of_expert(subject, name)]
            yield from faults
            lacking += bool(faults)
            if lacking > MAX_LACKING_EXPERTS:  # the number in config.json may be huge
                break
        for index, surplus in sorted(stored.get(holder, {}).items()):
            if index >= count and index in whole:
                claims = tuple(sorted(surplus))
                yield Fault(f"experts 0 to {count - 1}", f"expert {index}", tensor=holder, claims=claims)


def _expert_modules(modules: Iterable[str]) -> dict[str, dict[int, set[str]]]:
    """Experts module -> index of an expert -> its modules."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module in modules:
        if place := expert_of(module):
            found[place[0]][place[1]].add(module)
    return found


def _expert_counts(subject: Subject, holders: Iterable[str]) -> dict[str, int]:
    """Experts module on disk -> how many experts it must have; empty if that is not known.

    The record tells, else config.json. If the source has more than config.json says, by the names of its tensors, those
    are wanted too."""
    layout = subject.layout
    if layout.experts:
        return dict(layout.experts)
    if layout.num_experts is None:
        return {}
    source = _expert_modules(split_name(name)[0] for name in subject.source_tensors or ())
    return {
        holder: max([layout.num_experts, *(index + 1 for index in _whole(source.get(holder, {})))])
        for holder in holders
    }


def _whole(experts: Mapping[int, set[str]]) -> Iterator[int]:
    """The indices of those with all projections. Others are none: LongCat saves first layers to spare."""
    most = max(map(len, experts.values()), default=0)
    yield from (index for index, modules in experts.items() if len(modules) == most)


def _missing_of_expert(subject: Subject, module: str) -> Iterator[Fault]:
    if subject.weight(module) is None and not subject.files.may_have(f"{module}.weight"):
        yield Fault("the expert's weight", "missing", tensor=f"{module}.weight")
    elif module in subject.specs:
        yield from missing_companions(subject, module, "the expert's scale")


@check(
    "K7",
    "Every attention layer has its KV scales if the scheme says so, and none otherwise.",
    needs=("scheme",),
    consequence="vLLM silently uses 1.0 for a missing KV scale and ignores one that is not announced",
    remedy="calibrate the KV cache again, or set kv_cache_scheme",
)
def kv_scales_are_complete(subject: Subject) -> Iterator[Fault]:
    if subject.scheme.kv is not None:
        yield from _missing_kv(subject)
    attention = {*subject.layout.attention, *filter(None, map(attention_of, subject.layout.optional))}
    if not subject.layout.from_record:  # names do not tell which layers read keys and values that others cached
        attention |= {split_name(module)[0] for module in subject.layout.quantizable} & {*subject.kv_scales.values()}
    for name, module in subject.kv_scales.items():
        file = subject.files.tensors[name].shard
        if module not in attention:
            yield Fault("a KV scale of an attention layer", "no such layer", file, name, consequence="vLLM stops")
        elif split_name(name)[1] == "kv_scale":
            yield _legacy_kv(subject, file, name)
    if subject.scheme.kv is None and any(module in attention for module in subject.kv_scales.values()):
        yield _unannounced_kv(subject)


def _missing_kv(subject: Subject) -> Iterator[Fault]:
    have = {(module, split_name(name)[1]) for name, module in subject.kv_scales.items()}
    for module in subject.layout.attention:
        for leaf in ("k_scale", "v_scale"):
            name = f"{kv_scale_holder(module)}.{leaf}"
            if not (have & {(module, leaf), (module, "kv_scale")} or subject.files.may_have(name)):
                yield Fault("the KV scale", "missing", tensor=name)


def _legacy_kv(subject: Subject, file: str, name: str) -> Fault:
    """One scale for both, of early AutoFP8: fine in quant_method fp8, half lost in compressed-tensors."""
    is_fp8 = subject.scheme.method == "fp8"
    return Fault(
        "k_scale and v_scale",
        "the deprecated kv_scale",
        file,
        name,
        severity="warning" if is_fp8 else "error",
        consequence="vLLM uses it for both, with a warning" if is_fp8 else "vLLM silently keeps 1.0 for v",
        remedy="write it as k_scale and v_scale",
    )


def _unannounced_kv(subject: Subject) -> Fault:
    """The fp8 method has no key to announce KV scales: they need --kv-cache-dtype fp8."""
    first = min(subject.kv_scales)
    file, found = subject.files.tensors[first].shard, f"{len(subject.kv_scales)} KV scales, first {first}"
    if subject.scheme.method != "fp8":
        return Fault("kv_cache_scheme in config.json", found, file, severity="warning")
    return Fault(
        "a config that announces the KV scales",
        found,
        file,
        severity="warning",
        consequence="vLLM uses them only with --kv-cache-dtype fp8, and 1.0 otherwise",
        remedy="serve with --kv-cache-dtype fp8, or write compressed-tensors with kv_cache_scheme",
    )
