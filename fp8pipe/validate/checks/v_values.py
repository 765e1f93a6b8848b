"""V1 to V11: values. Are the numbers in the checkpoint usable, and do they use the range that their format has?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from fp8pipe.quantize.plan.record import OutputTensor
from fp8pipe.validate.checks.check import check
from fp8pipe.validate.checks.shared_scales import sharing_group, weight_scale_of
from fp8pipe.validate.faults import Fault
from fp8pipe.validate.meaning.formats import FP8, FP8_BY_POWERS, Spec
from fp8pipe.validate.meaning.names import expert_of, split_name
from fp8pipe.validate.measured import Magnitudes, Scale
from fp8pipe.validate.measuring.units import FAINT, FAINT_SCALES, top_value
from fp8pipe.validate.subject import Subject

FP16_SAFE = (3.1e-5, 146.0)
"""Range of per-tensor scales for which vLLM's requantization through fp16 is exact."""
GLOBAL_RANGE = (1.0, 1e9)
"""2688 / absmax of any weight that a network can hold; the inverse for scales that multiply."""
MAX_RATIO = 64
"""Between fused scales. Beyond it, the smaller members have no codes left."""
AGAIN = "quantize again"


def _place(shape: tuple[int, ...], flat: int) -> list[int]:
    return [int(i) for i in np.unravel_index(flat, shape)] if shape else []


@check(
    "V1",
    "No float tensor holds NaN or Inf, no weight a NaN code.",
    depth="values",
    consequence="vLLM loads it; every answer that passes through it is NaN",
    remedy="look into the source, then quantize again",
)
def values_are_finite(subject: Subject) -> Iterator[Fault]:
    for seen in subject.measured.tensors.values():
        if seen.nonfinite:
            shape = seen.spec.unpacked(seen.entry.shape) if seen.spec else seen.entry.shape
            found = f"{seen.nonfinite} NaN or Inf, the first at {_place(shape, seen.first_nonfinite)}"
            yield Fault("finite values", found, seen.entry.shard, seen.entry.name)


@check(
    "V2",
    "Scales are finite, positive and normal numbers, and powers of two where config.json or the recipe says so.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM loads it; the layer's output is NaN, zero or garbage (quant_method fp8: KV scales stop it)",
    remedy="quantize or calibrate again",
)
def scales_are_usable(subject: Subject) -> Iterator[Fault]:
    for scale in subject.measured.scales.values():
        entry = scale.entry
        if scale.first_unusable is not None:
            at, value = scale.first_unusable
            found = f"{scale.unusable} of {math.prod(entry.shape)}: {value!r} at {_place(entry.shape, at)}"
            yield Fault("finite normal values above zero", found, entry.shard, entry.name)
        if scale.zeros:
            found = f"{scale.zeros} of {math.prod(entry.shape)} are zero"
            consequence = "vLLM serves it; the weights of these groups are zero"
            yield Fault("scales above zero", found, entry.shard, entry.name, "warning", consequence)
        if scale.first_uneven is not None:
            at, value = scale.first_uneven
            found = f"{scale.uneven} of {math.prod(entry.shape)} are not: {value!r} at {_place(entry.shape, at)}"
            yield Fault(
                "powers of two",
                found,
                entry.shard,
                entry.name,
                consequence="vLLM rounds these scales for DeepGEMM and quantizes their weights a second time; "
                "transformers rounds the scales alone (scale_fmt ue8m0), which changes the weights",
                remedy="quantize again with scales: power_of_two",
            )


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
    for scale in subject.measured.scales.values():
        module, value = split_name(scale.entry.name)[0], scale.value
        spec = subject.specs.get(module)
        if scale.kind != "weight" or spec is None or spec.strategy != "tensor" or value is None:
            continue
        weight = subject.measured.tensors.get(f"{module}.{spec.weight}")
        is_used = weight is not None and weight.spec is not None and not weight.is_zero
        if is_used and not _is_faint(value) and not FP16_SAFE[0] <= value <= FP16_SAFE[1]:
            yield Fault(f"{FP16_SAFE[0]} to {FP16_SAFE[1]}", f"{value:.3g}", scale.entry.shard, scale.entry.name)


@check(
    "V4",
    "No scale is a placeholder: float32's minimum, -1, or 1.0 throughout a checkpoint or an experts module.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM takes it for a scale; weights or activations are off by orders of magnitude",
    remedy="calibrate or quantize again",
)
def scales_are_real(subject: Subject) -> Iterator[Fault]:
    by_kind: dict[str, list[Scale]] = defaultdict(list)
    assumed = _assumed(subject)
    for scale in subject.measured.scales.values():
        if scale.placeholder is not None:
            yield Fault("a scale", f"{scale.placeholder:.4g}", scale.entry.shard, scale.entry.name)
        if scale.entry.name in assumed or (
            scale.kind == "weight" and _is_blank(subject, split_name(scale.entry.name)[0])
        ):
            continue
        by_kind[scale.kind].append(scale)
        if scale.kind == "kv" and scale.all_one:
            yield Fault("a calibrated KV scale", "1.0", scale.entry.shard, scale.entry.name, severity="warning")
    for kind in ("weight", "global", "input"):
        if by_kind[kind] and all(scale.all_one for scale in by_kind[kind]):
            yield Fault(f"{kind} scales from data", f"all {len(by_kind[kind])} are exactly 1.0")
        elif kind == "input":
            yield from _experts_at_one(by_kind[kind])


def _assumed(subject: Subject) -> set[str]:
    """Scales of this engine that it did not measure, and says so in calibration.json."""
    if not subject.supplies("calibration") or not subject.supplies("records"):
        return set()
    calibration, outputs = subject.records.calibration, subject.plan.outputs
    assumed = calibration.assumed if calibration is not None else {}
    return {
        output.name
        for output in outputs
        if f"{output.source if output.role in ('k_scale', 'v_scale') else output.module}.{output.role}" in assumed
    }


def _is_blank(subject: Subject, module: str) -> bool:
    """Whether all codes of a weight are zero, so that any scale will do."""
    spec = subject.specs.get(module)
    weight = subject.measured.tensors.get(f"{module}.{spec.weight}") if spec is not None else None
    return weight is not None and weight.is_zero


def _experts_at_one(inputs: list[Scale]) -> Iterator[Fault]:
    """Experts modules whose largest input scale is exactly 1.0, which vLLM then takes for all their experts."""
    found: dict[tuple[str, str], list[Scale]] = defaultdict(list)
    for scale in inputs:
        module, leaf = split_name(scale.entry.name)
        if leaf == "input_scale" and scale.value is not None and (place := expert_of(module)) is not None:
            found[place[0], place[2]].append(scale)
    for (experts, projection), scales in found.items():
        ones = sum(scale.all_one for scale in scales)
        if ones and max(scale.value or 0.0 for scale in scales) == 1:
            yield Fault(
                f"input scales of {projection} from data",
                f"{ones} of {len(scales)} experts have exactly 1.0, the largest",
                scales[0].entry.shard,
                experts,
                severity="error" if ones == len(scales) else "warning",
                consequence="vLLM takes it for all experts of the layer: inputs below 0.001 become zero, those above "
                "448 are cut off",
            )


@check(
    "V5",
    "No weight is all zero where the source is not.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence="vLLM silently serves a layer whose output is zero",
    remedy=AGAIN,
)
def weights_are_not_blank(subject: Subject) -> Iterator[Fault]:
    for name, comparison in subject.measured.comparisons.items():
        is_faint = comparison.amax < FAINT and not comparison.unequal  # rounding gives nothing else
        if subject.measured.tensors[name].is_zero and comparison.amax > 0 and not is_faint:
            yield Fault(f"codes for weights up to {comparison.amax:.3g}", "all zero", comparison.entry.shard, name)


@check(
    "V6",
    "Every scale unit uses the range: its largest code is at the top (absmax), and few weights are clipped.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM serves it; the largest weights are cut off",
    remedy="quantize again with an absmax scale",
)
def codes_use_the_range(subject: Subject) -> Iterator[Fault]:
    for name, seen in subject.measured.tensors.items():
        yield from _unused_range(subject, name, seen)
    yield from _clipped(subject)


def _unused_range(subject: Subject, name: str, seen: Magnitudes) -> Iterator[Fault]:
    if seen.spec is None or not seen.spec.minmax or not seen.low:
        return
    members = sharing_group(subject, split_name(name)[0])
    if members is None or (len(members) > 1 and _joint_top(subject, members) >= seen.spec.format.top):
        return
    kind = seen.spec.format.codes
    yield Fault(
        f"a code of at least {top_value(seen.spec.format.top, kind):g} in every unit that is not zero",
        f"{seen.low} of {seen.units} units below, largest code {top_value(seen.largest_low, kind):g}",
        seen.entry.shard,
        name,
        severity="warning",
        consequence="vLLM serves it, but the weights use only part of the codes",
    )


def _joint_top(subject: Subject, members: tuple[str, ...]) -> int:
    found = [subject.measured.tensors.get(f"{member}.weight") for member in members]
    return max((seen.top for seen in found if seen is not None), default=0)


def _clipped(subject: Subject) -> Iterator[Fault]:
    """More than 1 % of the source weights that share a scale, and more than four, lie beyond scale * 448."""
    comparisons = subject.measured.comparisons
    for name, comparison in comparisons.items():
        if not comparison.most_clipped:
            continue
        members = sharing_group(subject, split_name(name)[0]) or ()
        together = [c for member in members if (c := comparisons.get(f"{member}.weight")) is not None]
        together = together if len(together) > 1 else [comparison]
        clipped, size = sum(c.most_clipped for c in together), sum(c.unit_size for c in together)
        if clipped > max(4, 0.01 * size):
            found = f"{clipped} of {size} clipped in unit {comparison.worst_unit}"
            yield Fault("source weights within scale * 448", found, comparison.entry.shard, name)


@check(
    "V7",
    "Codes are zero about as often as the source is.",
    depth="fidelity",
    severity="warning",
    needs=("scheme", "source"),
    yields_to=("V5",),
    consequence="vLLM serves it; small weights are lost to a scale that is too large for them",
    remedy=AGAIN,
)
def small_weights_survive(subject: Subject) -> Iterator[Fault]:
    for name, comparison in subject.measured.comparisons.items():
        count = comparison.count
        if (comparison.zero_codes - comparison.zero_source) / count > comparison.spec.format.zeros:
            found = f"{100 * comparison.zero_codes / count:.1f} %"
            expected = f"{100 * comparison.zero_source / count:.1f} % zero codes, as in the source"
            yield Fault(expected, found, comparison.entry.shard, name)


@check(
    "V8",
    "Scales are not inverted: NVFP4's global ones are as large as their format implies, FP8 weights within float16.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM silently divides where it should multiply: the weights are off by a factor of millions",
    remedy="write 2688 / absmax (compressed-tensors: weight_global_scale) or absmax / 2688 (ModelOpt: weight_scale_2)",
)
def scales_have_their_sense(subject: Subject) -> Iterator[Fault]:
    yield from _inverted_fp8(subject)
    for scale in subject.measured.scales.values():
        spec = subject.specs.get(split_name(scale.entry.name)[0])
        if spec is None or spec.global_scale is None or (value := _usable(scale)) is None:
            continue
        low, high = GLOBAL_RANGE if spec.global_divides else (1 / GLOBAL_RANGE[1], 1 / GLOBAL_RANGE[0])
        if not low <= value <= high:
            severity = "error" if scale.kind == "global" else "warning"
            yield Fault(f"{low:g} to {high:g}", f"{value:.4g}", scale.entry.shard, scale.entry.name, severity)


def _inverted_fp8(subject: Subject) -> Iterator[Fault]:
    """Scales by which a weight would be larger than float16 holds. V3 says it of scales for a whole weight."""
    for scale in subject.measured.scales.values():
        spec = subject.specs.get(split_name(scale.entry.name)[0])
        if scale.kind != "weight" or spec is None or spec.strategy not in ("channel", "block"):
            continue
        if spec.format in (FP8, FP8_BY_POWERS) and scale.largest > FP16_SAFE[1]:
            yield Fault(
                f"at most {FP16_SAFE[1]:g}: weights within float16",
                f"{scale.largest:.4g}",
                scale.entry.shard,
                scale.entry.name,
                "warning",
                remedy="if these are the reciprocals, write absmax / 448",
            )


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
    for group in subject.layout.fused:
        where = split_name(group[0])[0]
        known = {module: weight_scale_of(subject, module) for module in group}
        used = {module for module in known if not _is_blank(subject, module)}  # of zeros any scale is right
        present = {module: value for module, value in known.items() if module in used and value is not None}
        values = {module: value for module, value in present.items() if value < math.inf and not _is_faint(value)}
        if len(set(values.values())) > 1:
            ratio = max(values.values()) / min(values.values())
            severity = "error" if ratio > MAX_RATIO else None
            yield Fault("one scale", f"{_listed(values)} (ratio {ratio:.3g})", tensor=where, severity=severity)
        values = _scalars(subject, group, lambda spec: spec.global_scale)
        if len(set(values.values())) > 1:
            consequence = (
                "vLLM takes the largest global scale for all: the others' weights are scaled wrongly, with a warning"
            )
            yield Fault("one global scale", _listed(values), None, where, "error", consequence)


@check(
    "V10",
    "Static input scales of a fused group are equal, since its members see the same input.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM takes the largest for all; in compressed-tensors experts it stops when w1 and w3 differ",
    remedy="calibrate again",
)
def fused_input_scales_are_equal(subject: Subject) -> Iterator[Fault]:
    for group in subject.layout.fused:
        values = _scalars(subject, group, lambda spec: spec.input_scale)
        if values and max(values.values()) > min(values.values()) * 1.001:
            yield Fault("one input_scale", _listed(values), tensor=split_name(group[0])[0])


def _scalars(subject: Subject, group: tuple[str, ...], leaf: Callable[[Spec], str | None]) -> dict[str, float]:
    """Module -> the one value of its scale with that leaf name, if one can divide by it."""
    found = {}
    for module in group:
        spec = subject.specs.get(module)
        scale = subject.measured.scales.get(f"{module}.{leaf(spec)}") if spec else None
        if scale is not None and (value := _usable(scale)) is not None:
            found[module] = value
    return found


def _usable(scale: Scale) -> float | None:
    """The one value of a scalar, if one can divide by it."""
    return scale.value if scale.value is not None and 0 < scale.value < math.inf else None


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{split_name(module)[1]} {value:.4g}" for module, value in values.items())


@check(
    "V11",
    "Input and KV scales are the ranges of calibration.json, divided by 448, to the last bit.",
    depth="values",
    needs=("records", "calibration"),
    consequence="vLLM silently clips activations or keys and values, or rounds them too coarsely",
    remedy="quantize again with this calibration",
)
def scales_are_those_of_the_calibration(subject: Subject) -> Iterator[Fault]:
    for output, amax in _calibrated(subject):
        scale = subject.measured.scales.get(output.name)
        if scale is None or scale.values is None:
            continue
        found = scale.values.ravel()
        expected = np.maximum(np.array(amax, np.float32), np.float32(1e-12)) / np.float32(448)
        if found.shape != expected.shape:
            yield Fault(f"{expected.size} values", f"{found.size}", scale.entry.shard, output.name)
        elif (other := found != expected).any():
            at = int(np.flatnonzero(other)[0])
            wanted = f"{float(expected[at])!r} from the range {amax[at]!r}"
            yield Fault(wanted, f"{float(found[at])!r}", scale.entry.shard, output.name)


def _calibrated(subject: Subject) -> Iterator[tuple[OutputTensor, tuple[float, ...]]]:
    """Every calibrated scale of the plan with its ranges; of a fused group the largest counts for all members."""
    calibration = subject.records.calibration
    assert calibration is not None
    largest: dict[str, float] = defaultdict(lambda: -math.inf)
    for output in subject.plan.outputs:
        if output.role == "input_scale":
            key = output.group or output.module
            largest[key] = max(largest[key], calibration.inputs.get(output.module, -math.inf))
    for output in subject.plan.outputs:
        if output.role == "input_scale":
            yield output, (largest[output.group or output.module],)
        elif output.role in ("k_scale", "v_scale") and (ranges := calibration.kv.get(output.source)) is not None:
            yield output, ranges.k_amax if output.role == "k_scale" else ranges.v_amax


def _is_faint(scale: float) -> bool:
    """Whether it is the scale that the engine gives a unit with hardly any codes."""
    return FAINT_SCALES[0] <= scale <= FAINT_SCALES[1]
