"""Codes, scales and copies against the source they were made from (checks V5, V7, D1 to D6).

In: a Subject that has been compared with its source (`compare.py`). Out: faults.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from fp8pipe.validate.compare import ARITHMETICS, Arithmetic, Comparison, Share, hold_to_amax
from fp8pipe.validate.findings import Fault, check
from fp8pipe.validate.layout import split_name
from fp8pipe.validate.measure import Magnitudes, Measured
from fp8pipe.validate.values import sharing_group, weight_scale_of

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

OTHER_MATRIX = "vLLM serves another matrix than the source's, without a word"
AGAIN = "quantize again"
EXACT_SHARE = 0.9
"""When so many scales equal absmax / 448 in one arithmetic, the others must too."""


# ---------------------------------------------------------------------------------------------- checks


def _measured(subject: Subject) -> Measured:
    assert subject.measured is not None
    return subject.measured


def _weights(subject: Subject) -> Iterator[tuple[str, Comparison, Magnitudes]]:
    """(module, comparison, magnitudes) of every weight that was compared."""
    for name, comparison in _measured(subject).comparisons.items():
        yield split_name(name)[0], comparison, _measured(subject).tensors[name]


@check(
    "V5",
    "No weight is all zero where the source is not.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence="vLLM serves a layer that answers nothing, without a word",
    remedy=AGAIN,
)
def weights_are_not_blank(subject: Subject) -> Iterator[Fault]:
    for _, comparison, seen in _weights(subject):
        if seen.is_zero and comparison.amax > 0:
            yield Fault(f"codes for weights up to {comparison.amax:.3g}", "all zero", seen.entry.shard, seen.entry.name)


@check(
    "V7",
    "Codes are zero about as often as the source is.",
    depth="fidelity",
    severity="warning",
    needs=("scheme", "source"),
    consequence="vLLM serves it; small weights are lost to a scale that is too large for them",
    remedy=AGAIN,
)
def small_weights_survive(subject: Subject) -> Iterator[Fault]:
    for _, comparison, seen in _weights(subject):
        count = comparison.count
        lost = (comparison.zero_codes - comparison.zero_source) / count
        if lost > comparison.spec.format.zeros and not seen.is_zero:
            found = f"{100 * comparison.zero_codes / count:.1f} %"
            expected = f"{100 * comparison.zero_source / count:.1f} % zero codes, as in the source"
            yield Fault(expected, found, seen.entry.shard, seen.entry.name)


@check(
    "D1",
    "Every code is within half a step of source / scale (and one bf16 rounding), unless clipped.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence=OTHER_MATRIX,
    remedy=AGAIN,
)
def codes_are_roundings(subject: Subject) -> Iterator[Fault]:
    for _, comparison, seen in _weights(subject):
        if comparison.first_off is not None:
            at, wanted, value = comparison.first_off
            found = f"{comparison.off} codes that are not, the first at {at}: {value:g}"
            yield Fault(f"the rounding of source / scale, there {wanted:.6g}", found, seen.entry.shard, seen.entry.name)


@check(
    "D2",
    "Codes are the nearest to source / scale: all within one step but one in a thousand.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence=OTHER_MATRIX,
    remedy=AGAIN,
)
def codes_are_nearest(subject: Subject) -> Iterator[Fault]:
    loose, total, share = 0, 0, 0.0
    for _, comparison, seen in _weights(subject):
        count = comparison.count
        total += 1
        if comparison.far > count / 1000:
            found = f"{comparison.far} of {count} are more than one step away"
            yield Fault("the nearest code or its neighbour", found, seen.entry.shard, seen.entry.name)
        elif comparison.not_nearest > count / 1000 and not comparison.off:
            loose, share = loose + 1, max(share, comparison.not_nearest / count)
    if loose:
        yield Fault(
            "the nearest code for the stored scale",
            f"{loose} of {total} weights with up to {100 * share:.1f} % of the codes one step away",
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
    for _, comparison, seen in _weights(subject):
        warn, fail = comparison.spec.format.rel_l2
        if comparison.rel_l2 > warn:
            severity = "error" if comparison.rel_l2 > fail else "warning"
            expected = f"relative error (L2) at most {warn}"
            yield Fault(expected, f"{comparison.rel_l2:.4g}", seen.entry.shard, seen.entry.name, severity)


@check(
    "D4",
    "Every tensor that is not quantized equals the source, byte for byte.",
    depth="fidelity",
    needs=("source",),
    consequence="vLLM serves altered weights, without a word",
    remedy=AGAIN,
)
def kept_tensors_are_untouched(subject: Subject) -> Iterator[Fault]:
    for name, offset in _measured(subject).altered.items():
        entry = subject.shelf.tensors[name]
        yield Fault("the source's bytes", f"the first other byte at {offset} of {entry.nbytes}", entry.shard, name)


@check(
    "D5",
    "Every row points where the source's row does: FP8 at least cosine 0.998.",
    depth="fidelity",
    severity="warning",
    needs=("scheme", "source"),
    consequence="vLLM serves it; this output channel is worse than its format should be",
    remedy=AGAIN,
)
def rows_keep_their_direction(subject: Subject) -> Iterator[Fault]:
    for _, comparison, seen in _weights(subject):
        least = comparison.spec.format.min_cosine
        if comparison.worst_cosine < least and not comparison.off:  # D1 says more
            found = f"{comparison.worst_cosine:.5f} in row {comparison.worst_row}"
            yield Fault(f"cosine at least {least}", found, seen.entry.shard, seen.entry.name)


@check(
    "D6",
    "Scales belong to their weights: scale * 448 is the largest source weight of the unit.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence="vLLM multiplies the codes by a wrong scale, without a word",
    remedy=AGAIN,
)
def scales_match_their_weights(subject: Subject) -> Iterator[Fault]:
    held = [(seen, comparison, *_held(subject, module, comparison)) for module, comparison, seen in _weights(subject)]
    arithmetic = _arithmetic([(comparison.units, inexact) for _, comparison, _, inexact in held])
    for seen, comparison, ratio, inexact in held:
        low, high = comparison.spec.format.amax_ratio
        if ratio.count:
            expected = f"scale * {comparison.spec.format.codes.maximum:g} / amax in {low} to {high}"
            found = f"{ratio.value:.4g} in unit {ratio.first}; {ratio.count} of {comparison.units} units"
            yield Fault(expected, found, seen.entry.shard, seen.entry.name)
        elif arithmetic is not None and (other := inexact.get(arithmetic)) is not None and other.count:
            expected = f"{other.wanted!r}, absmax / 448 like the other scales"
            found = f"{other.value!r} in unit {other.first}; {other.count} of {comparison.units} units"
            yield Fault(expected, found, seen.entry.shard, seen.entry.name)


def _held(subject: Subject, module: str, comparison: Comparison) -> tuple[Share, dict[Arithmetic, Share]]:
    """Units whose scale does not fit their range; where fused siblings share a scale, the range is over all of them."""
    if comparison.spec.strategy != "tensor":
        return comparison.bad_ratio, comparison.inexact
    bad, inexact = Share(), dict[Arithmetic, Share]()
    scale, members = weight_scale_of(subject, module), sharing_group(subject, module) or ()
    together = [_measured(subject).comparisons.get(f"{member}.weight") for member in members]
    known = [one.amax for one in together if one is not None]
    if scale is not None and known and len(known) == len(members):
        hold_to_amax(bad, inexact, comparison.spec, torch.tensor([scale]), torch.tensor([max(known)]))
    return bad, inexact


def _arithmetic(found: list[tuple[int, dict[Arithmetic, Share]]]) -> Arithmetic | None:
    """The arithmetic in which nearly all scales are exactly absmax / 448, None when there is no such."""
    units = sum(count for count, inexact in found if inexact)
    if not units:
        return None
    wrong = {exact: sum(inexact[exact].count for _, inexact in found if inexact) for exact in ARITHMETICS}
    best = min(ARITHMETICS, key=lambda exact: wrong[exact])
    return best if wrong[best] <= (1 - EXACT_SHARE) * units else None
