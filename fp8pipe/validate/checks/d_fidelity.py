"""D1 to D8: fidelity. Are codes, scales and copies what the source makes of them?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fp8pipe.quantize.plan.record import OutputTensor
from fp8pipe.validate.checks.check import check
from fp8pipe.validate.checks.shared_scales import sharing_group, weight_scale_of
from fp8pipe.validate.faults import Fault
from fp8pipe.validate.meaning.names import split_name
from fp8pipe.validate.measured import Comparison, Share
from fp8pipe.validate.measuring.compare import ARITHMETICS, engine_scales, hold_to_amax
from fp8pipe.validate.subject import Subject

OTHER_MATRIX = "vLLM silently serves another matrix than the source's"
AGAIN = "quantize again"
EXACT_SHARE = 0.9
"""If this share of the scales is exactly absmax / 448 in one arithmetic, all must be."""


def _of(comparison: Comparison, expected: str, found: str) -> Fault:
    """A fault of the weight that was compared."""
    return Fault(expected, found, comparison.entry.shard, comparison.entry.name)


@check(
    "D1",
    "Every code is within half a step of source / scale (and one bf16 rounding), unless clipped.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence=OTHER_MATRIX,
    remedy=AGAIN,
)
def codes_are_roundings(subject: Subject) -> Iterator[Fault]:
    for comparison in subject.measured.comparisons.values():
        if comparison.first_off is not None:
            at, wanted, value = comparison.first_off
            found = f"{comparison.off} codes that are not, the first at {at}: {value:g}"
            yield _of(comparison, f"the rounding of source / scale, there {wanted:.6g}", found)


@check(
    "D2",
    "Codes are the nearest to source / scale: all within one step but one in a thousand.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence=OTHER_MATRIX,
    remedy=AGAIN,
)
def codes_are_nearest(subject: Subject) -> Iterator[Fault]:
    comparisons = subject.measured.comparisons.values()
    loose = []
    for comparison in comparisons:
        allowed = comparison.count / 1000
        if comparison.far > allowed:
            found = f"{comparison.far} of {comparison.count} are more than one step away"
            yield _of(comparison, "the nearest code or its neighbour", found)
        elif comparison.not_nearest > allowed and not comparison.off:
            loose.append(comparison.not_nearest / comparison.count)
    if loose:
        share = f"up to {100 * max(loose):.1f} % of the codes one step away"
        yield Fault(
            "the nearest code for the stored scale",
            f"{len(loose)} of {len(comparisons)} weights with {share}",
            severity="warning",
            consequence="vLLM serves it; the error is slightly above the least possible, as when scales are rounded "
            "to bf16 after use or the division is made in bf16",
            remedy="quantize with the scale that is stored, in float32",
        )


@check(
    "D3",
    "The quantization error of a whole weight is that of its format.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence=OTHER_MATRIX,
    remedy=AGAIN,
)
def error_is_that_of_the_format(subject: Subject) -> Iterator[Fault]:
    for comparison in subject.measured.comparisons.values():
        warn, fail = comparison.spec.format.rel_l2
        if comparison.rel_l2 > warn:
            severity = "error" if comparison.rel_l2 > fail else "warning"
            expected, entry = f"relative error (L2) at most {warn}", comparison.entry
            yield Fault(expected, f"{comparison.rel_l2:.4g}", entry.shard, entry.name, severity)


@check(
    "D4",
    "Every tensor that is not quantized equals the source, byte for byte.",
    depth="fidelity",
    needs=("source",),
    consequence="vLLM silently serves altered weights",
    remedy=AGAIN,
)
def kept_tensors_are_untouched(subject: Subject) -> Iterator[Fault]:
    for name, offset in subject.measured.altered.items():
        entry = subject.files.tensors[name]
        yield Fault("the source's bytes", f"the first other byte at {offset} of {entry.nbytes}", entry.shard, name)


@check(
    "D5",
    "Every row points where the source's row does: FP8 at least cosine 0.998.",
    depth="fidelity",
    severity="warning",
    needs=("scheme", "source"),
    yields_to=("D1",),
    consequence="vLLM serves it; this output channel is worse than its format should be",
    remedy=AGAIN,
)
def rows_keep_their_direction(subject: Subject) -> Iterator[Fault]:
    for comparison in subject.measured.comparisons.values():
        least = comparison.spec.format.min_cosine
        if comparison.worst_cosine < least:
            found = f"{comparison.worst_cosine:.5f} in row {comparison.worst_row}"
            yield _of(comparison, f"cosine at least {least}", found)


@check(
    "D6",
    "Scales belong to their weights: scale * 448 is the largest source weight of the unit.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence="vLLM silently multiplies the codes by a wrong scale",
    remedy=AGAIN,
)
def scales_match_their_weights(subject: Subject) -> Iterator[Fault]:
    held = [(comparison, *_held(subject, comparison)) for comparison in subject.measured.comparisons.values()]
    arithmetic = _arithmetic([(comparison.units, inexact) for comparison, _, inexact in held])
    for comparison, ratio, inexact in held:
        low, high = comparison.spec.format.amax_ratio
        if ratio.count:
            expected = f"scale * {comparison.spec.format.codes.maximum:g} / amax in {low} to {high}"
            found = f"{ratio.value:.4g} in unit {ratio.first}; {ratio.count} of {comparison.units} units"
            yield _of(comparison, expected, found)
        elif arithmetic is not None and (other := inexact.get(arithmetic)) is not None and other.count:
            expected = f"{other.wanted!r}, absmax / 448 like the other scales"
            found = f"{other.value!r} in unit {other.first}; {other.count} of {comparison.units} units"
            yield _of(comparison, expected, found)


def _held(subject: Subject, comparison: Comparison) -> tuple[Share, dict[str, Share]]:
    """Units whose scale does not fit their range; if fused siblings share a scale, the range is over all of them."""
    if comparison.spec.strategy != "tensor":
        return comparison.bad_ratio, comparison.inexact
    module = split_name(comparison.entry.name)[0]
    bad, inexact = Share(), dict[str, Share]()
    scale, members = weight_scale_of(subject, module), sharing_group(subject, module) or ()
    amax = _joint_amax(subject, [f"{member}.weight" for member in members])
    if scale is not None and amax is not None:
        hold_to_amax(bad, inexact, comparison.spec, torch.tensor([scale]), torch.tensor([amax]))
    return bad, inexact


def _joint_amax(subject: Subject, weights: list[str]) -> float | None:
    """Largest source magnitude of all `weights`; None if one was not compared."""
    known = [found.amax for name in weights if (found := subject.measured.comparisons.get(name)) is not None]
    return max(known) if known and len(known) == len(weights) else None


def _arithmetic(found: list[tuple[int, dict[str, Share]]]) -> str | None:
    """The arithmetic in which nearly all scales are exactly absmax / 448; None if there is none."""
    units = sum(count for count, inexact in found if inexact)
    if not units:
        return None
    wrong = {name: sum(inexact[name].count for _, inexact in found if inexact) for name in ARITHMETICS}
    best = min(ARITHMETICS, key=lambda name: wrong[name])
    return best if wrong[best] <= (1 - EXACT_SHARE) * units else None


@check(
    "D7",
    "A checkpoint of this engine equals its requantization from the source, bit for bit.",
    depth="fidelity",
    needs=("scheme", "source", "records"),
    consequence="vLLM serves it; these are not the bytes that the record describes",
    remedy="quantize again into an empty folder",
)
def bytes_are_those_of_the_engine(subject: Subject) -> Iterator[Fault]:
    for output in subject.plan.outputs:
        comparison = subject.measured.comparisons.get(output.name)
        if output.role != "weight" or comparison is None:
            continue
        if comparison.unequal:
            expected = f"the codes of the engine, all {comparison.count}"
            yield _of(comparison, expected, f"{comparison.unequal} other codes")
        elif inexact := _inexact_units(subject, output, comparison):
            name = f"{output.module}.{comparison.spec.scale}"
            yield Fault("the scales of the engine", f"{inexact} others", comparison.entry.shard, name)


def _inexact_units(subject: Subject, output: OutputTensor, comparison: Comparison) -> int:
    """Units whose scale the engine would not have chosen."""
    if comparison.spec.strategy != "tensor":
        return comparison.foreign_scales
    shares = subject.plan.settings.weights.share_scales
    weights = [
        other
        for other in subject.plan.outputs
        if other.role == "weight" and (other.name == output.name or (shares and _are_fused(other, output)))
    ]
    amax = _joint_amax(subject, [other.name for other in weights])
    scale = weight_scale_of(subject, output.module)
    if scale is None or amax is None:
        return 0
    return int(np.float32(scale) not in engine_scales(np.float32(amax), comparison.spec))


def _are_fused(one: OutputTensor, other: OutputTensor) -> bool:
    return one.group != "" and one.group == other.group


@check(
    "D8",
    "Every quantized weight has values in the source to be compared with.",
    depth="fidelity",
    severity="warning",
    needs=("scheme", "source"),
    consequence="none in vLLM; nobody can tell whether these weights are the source's",
    remedy="name the unquantized source, or one whose FP8 weights have weight_scale_inv or weight_scale beside them",
)
def weights_can_be_compared(subject: Subject) -> Iterator[Fault]:
    """One finding for all: in a source whose format is not known, it is true of every weight."""
    if uncompared := subject.measured.uncompared:
        first, dtypes = min(uncompared), ", ".join(sorted(set(uncompared.values())))
        expected = "source weights of F32, BF16 or F16, or FP8 ones with their scales"
        found = f"{len(uncompared)} weights of {dtypes}, whose values are not known"
        yield Fault(expected, found, subject.files.tensors[first].shard, first)
