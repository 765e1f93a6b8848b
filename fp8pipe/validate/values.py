"""Judgement on the numbers that the pass saw in the checkpoint itself (checks V1 to V4, V6, V8 to V10).

In: a Subject that has been measured. Out: faults.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fp8pipe.validate.findings import Fault, check
from fp8pipe.validate.layout import split_name
from fp8pipe.validate.measure import Measured, Scale
from fp8pipe.validate.units import top_value

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

FP16_SAFE = (3.1e-5, 146.0)
"""Range of per-tensor scales for which vLLM's requantization through fp16 is exact."""
GLOBAL_RANGE = (1.0, 1e9)
"""2688 / absmax for any weight that a network can hold; as a multiplier the inverse."""
MAX_RATIO = 64
"""Between fused scales, before the smaller members have no code left."""


def _measured(subject: Subject) -> Measured:
    assert subject.measured is not None
    return subject.measured


def _module(scale: Scale) -> str:
    return split_name(scale.entry.name)[0]


def _place(shape: tuple[int, ...], flat: int) -> list[int]:
    return [int(i) for i in np.unravel_index(flat, shape)] if shape else []


def weight_scale_of(subject: Subject, module: str) -> float | None:
    """The module's one weight scale; None when it has several, or scale or weight are not as they should be."""
    spec = subject.specs.get(module)
    weight = subject.weight(module)
    if spec is None or weight is None or spec.strategy != "tensor":
        return None
    if (shape := subject.source_shape(module)) is not None and weight.shape != spec.stored(shape):
        return None
    scale = _measured(subject).scales.get(f"{module}.{spec.scale}")
    return scale.value if scale is not None and scale.entry.shape in ((1,), ()) else None


def sharing_group(subject: Subject, module: str) -> tuple[str, ...] | None:
    """The members of the module's fused group with the same per-tensor scale; a maximum over them is the unit's.

    None when a member's scale is missing or misshapen, so that nobody can tell whose maximum made it.
    """
    assert subject.layout is not None
    if subject.specs[module].strategy != "tensor":
        return (module,)
    scale = weight_scale_of(subject, module)
    members = [m for m in subject.layout.group_of.get(module, (module,)) if m in subject.specs]
    scales = {member: other for member in members if (other := weight_scale_of(subject, member)) is not None}
    if scale is None or len(scales) < len(members):
        return None
    return tuple(member for member, other in scales.items() if other == scale)


# ---------------------------------------------------------------------------------------------- checks


@check(
    "V1",
    "No float tensor holds NaN or Inf, no weight a NaN code.",
    depth="values",
    consequence="vLLM loads it; every answer that passes through it is NaN",
    remedy="look into the source, then quantize again",
)
def values_are_finite(subject: Subject) -> Iterator[Fault]:
    for seen in _measured(subject).tensors.values():
        if seen.nonfinite:
            shape = seen.spec.unpacked(seen.entry.shape) if seen.spec else seen.entry.shape
            found = f"{seen.nonfinite} NaN or Inf, the first at {_place(shape, seen.first_nonfinite)}"
            yield Fault("finite values", found, seen.entry.shard, seen.entry.name)


@check(
    "V2",
    "Scales are finite, positive and normal numbers.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM loads it; the layer's output is NaN, zero or garbage (quant_method fp8: KV scales stop it)",
    remedy="quantize or calibrate again",
)
def scales_are_usable(subject: Subject) -> Iterator[Fault]:
    for scale in _measured(subject).scales.values():
        entry = scale.entry
        if scale.first_unusable is not None:
            at, value = scale.first_unusable
            found = f"{scale.unusable} of {math.prod(entry.shape)}: {value!r} at {_place(entry.shape, at)}"
            yield Fault("finite normal values above zero", found, entry.shard, entry.name)
        if scale.zeros:
            found = f"{scale.zeros} of {math.prod(entry.shape)} are zero"
            told = "vLLM serves it; the weights of these groups are zero"
            yield Fault("scales above zero", found, entry.shard, entry.name, severity="warning", consequence=told)


@check(
    "V3",
    "Per-tensor scales survive vLLM's requantization through fp16.",
    depth="values",
    severity="warning",
    needs=("scheme",),
    consequence="vLLM requantizes per-tensor weights through fp16 at load; outside 3.1e-5 to 146 values change",
    remedy="use per-channel scales for this module",
)
def scales_survive_fp16(subject: Subject) -> Iterator[Fault]:
    for scale in _measured(subject).scales.values():
        spec, value = subject.specs.get(_module(scale)), scale.value
        if scale.kind != "weight" or spec is None or spec.strategy != "tensor" or value is None:
            continue
        weight = _measured(subject).tensors.get(f"{_module(scale)}.{spec.weight}")
        is_used = weight is not None and weight.spec is not None and not weight.is_zero
        if is_used and value > 0 and not FP16_SAFE[0] <= value <= FP16_SAFE[1]:
            yield Fault(f"{FP16_SAFE[0]} to {FP16_SAFE[1]}", f"{value:.3g}", scale.entry.shard, scale.entry.name)


@check(
    "V4",
    "No scale is a placeholder: float32's minimum, -1, or 1.0 throughout.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM takes it for a scale; weights or activations are off by orders of magnitude",
    remedy="calibrate or quantize again",
)
def scales_are_real(subject: Subject) -> Iterator[Fault]:
    by_kind: dict[str, list[Scale]] = defaultdict(list)
    for scale in _measured(subject).scales.values():
        by_kind[scale.kind].append(scale)
        if scale.placeholder is not None:
            yield Fault("a scale", f"{scale.placeholder:.4g}", scale.entry.shard, scale.entry.name)
        if scale.kind == "kv" and scale.all_one:
            yield Fault("a calibrated KV scale", "1.0", scale.entry.shard, scale.entry.name, severity="warning")
    for kind in ("weight", "global", "input"):
        if by_kind[kind] and all(scale.all_one for scale in by_kind[kind]):
            yield Fault(f"{kind} scales from data", f"all {len(by_kind[kind])} are exactly 1.0")


@check(
    "V6",
    "Every scale unit uses the range: its largest code is at the top (absmax), and few weights are clipped.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM serves it; the largest weights are cut off",
    remedy="quantize again with an absmax scale",
)
def codes_use_the_range(subject: Subject) -> Iterator[Fault]:
    yield from _unused_range(subject)
    yield from _clipped(subject)


def _unused_range(subject: Subject) -> Iterator[Fault]:
    for name, seen in _measured(subject).tensors.items():
        if seen.spec is None or not seen.spec.minmax or not seen.low:
            continue
        members = sharing_group(subject, split_name(name)[0])
        if members is None or (len(members) > 1 and _joint_top(subject, members) >= seen.spec.format.top):
            continue
        kind = seen.spec.format.codes
        yield Fault(
            f"a code of at least {top_value(seen.spec.format.top, kind):g} in every unit that is not zero",
            f"{seen.low} of {seen.units} units below, largest code {top_value(seen.largest_low, kind):g}",
            seen.entry.shard,
            name,
            severity="warning",
            consequence="vLLM serves it, with fewer of the codes than there are",
        )


def _joint_top(subject: Subject, members: tuple[str, ...]) -> int:
    found = [_measured(subject).tensors.get(f"{member}.weight") for member in members]
    return max((seen.top for seen in found if seen is not None), default=0)


def _clipped(subject: Subject) -> Iterator[Fault]:
    """Source weights beyond scale * 448: at most 1 % of what shares a scale, and four. Needs the comparison."""
    comparisons = _measured(subject).comparisons
    for name, comparison in comparisons.items():
        if not comparison.most_clipped:
            continue
        members = sharing_group(subject, split_name(name)[0]) or ()
        together = [c for member in members if (c := comparisons.get(f"{member}.weight")) is not None]
        clipped = sum(c.most_clipped for c in together) if len(together) > 1 else comparison.most_clipped
        size = sum(c.unit_size for c in together) if len(together) > 1 else comparison.unit_size
        if clipped > max(4, 0.01 * size):
            found = f"{clipped} of {size} clipped in unit {comparison.worst_unit}"
            yield Fault("source weights within scale * 448", found, comparison.entry.shard, name)


@check(
    "V8",
    "NVFP4's global scales have the size and the sense that their format gives them.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM divides where it should multiply: the weights are off by a factor of millions, without a word",
    remedy="write 2688 / absmax (compressed-tensors: weight_global_scale) or absmax / 2688 (ModelOpt: weight_scale_2)",
)
def global_scales_have_their_sense(subject: Subject) -> Iterator[Fault]:
    for scale in _measured(subject).scales.values():
        spec, value = subject.specs.get(_module(scale)), scale.value
        if spec is None or spec.global_scale is None or value is None or not 0 < value < math.inf:
            continue
        low, high = GLOBAL_RANGE if spec.global_divides else (1 / GLOBAL_RANGE[1], 1 / GLOBAL_RANGE[0])
        if not low <= value <= high:
            is_weight = scale.kind == "global"
            found = f"{value:.4g}"
            severity = "error" if is_weight else "warning"
            yield Fault(f"{low:g} to {high:g}", found, scale.entry.shard, scale.entry.name, severity=severity)


@check(
    "V9",
    "Scales for a whole weight are equal in a fused group.",
    depth="values",
    severity="warning",
    needs=("scheme",),
    consequence="vLLM requantizes the group to its largest scale at load: a second rounding",
    remedy="quantize the group with one scale",
)
def fused_scales_are_equal(subject: Subject) -> Iterator[Fault]:
    assert subject.layout is not None
    for group in subject.layout.fused:
        values = {m: value for m in group if (value := weight_scale_of(subject, m)) is not None and _divides(value)}
        if len(values) > 1 and max(values.values()) > min(values.values()):
            ratio = max(values.values()) / min(values.values())
            found = f"{_listed(values)} (ratio {ratio:.3g})"
            severity = "error" if ratio > MAX_RATIO else None
            yield Fault("one scale", found, tensor=split_name(group[0])[0], severity=severity)
        yield from _other_globals(subject, group)


def _other_globals(subject: Subject, group: tuple[str, ...]) -> Iterator[Fault]:
    values = {}
    for module in group:
        spec = subject.specs.get(module)
        scale = _measured(subject).scales.get(f"{module}.{spec.global_scale}") if spec else None
        if scale is not None and scale.value is not None and _divides(scale.value):
            values[module] = scale.value
    if len(set(values.values())) > 1:
        told = "vLLM takes the largest global scale for all: the others' weights are scaled wrongly, with a warning"
        where = split_name(group[0])[0]
        yield Fault("one global scale", _listed(values), tensor=where, severity="error", consequence=told)


def _divides(value: float) -> bool:
    return 0 < value < math.inf


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{split_name(module)[1]} {value:.4g}" for module, value in values.items())


@check(
    "V10",
    "Static input scales of a fused group are equal, since its members see the same input.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM takes the largest for all; in compressed-tensors experts it stops when w1 and w3 differ",
    remedy="calibrate again",
)
def fused_input_scales_are_equal(subject: Subject) -> Iterator[Fault]:
    assert subject.layout is not None
    for group in subject.layout.fused:
        values = {}
        for module in group:
            spec = subject.specs.get(module)
            scale = _measured(subject).scales.get(f"{module}.{spec.input_scale}") if spec else None
            if scale is not None and scale.value is not None and _divides(scale.value):
                values[module] = scale.value
        if len(values) > 1 and max(values.values()) > min(values.values()) * 1.001:
            yield Fault("one input_scale", _listed(values), tensor=split_name(group[0])[0])
