"""L1 and L2: what transformers' own loader makes of the weights, dequantized, beside the source's."""

from __future__ import annotations

from collections.abc import Iterator

from fp8pipe.oracle.loaded import Loaded
from fp8pipe.validate.checks.check import check
from fp8pipe.validate.faults import Fault
from fp8pipe.validate.meaning.formats import FP8, FP8_BY_POWERS
from fp8pipe.validate.subject import Subject


@check(
    "L1",
    "Each parameter that transformers loads from the dequantized checkpoint is the source's, within FP8's error.",
    depth="loaded",
    needs=("loaded",),
    consequence="the weights of another model are served, although codes and scales may agree with each other",
    remedy="quantize again; if it happens again, report the architecture",
)
def parameters_are_the_sources(subject: Subject) -> Iterator[Fault]:
    for one in subject.loaded:
        if one.fault:
            yield Fault("the source's parameter", one.fault, tensor=one.name)
        elif not one.incomparable and one.error > (limit := _limit(subject, one)):
            expected = f"relative error (L2) at most {limit}" if limit else "the source's values"
            yield Fault(expected, f"relative error {one.error:.4g}", tensor=one.name)


@check(
    "L2",
    "Each tensor of the checkpoint has a place in transformers' model, so that its weights can be compared.",
    depth="loaded",
    severity="warning",
    needs=("loaded",),
    consequence="none in vLLM; transformers cannot tell whether these weights are the source's",
    remedy="none, if transformers knows no such tensor of the source either",
)
def parameters_can_be_compared(subject: Subject) -> Iterator[Fault]:
    for one in subject.loaded:
        if one.incomparable:
            yield Fault("a parameter for it", f"not comparable, because {one.incomparable}", tensor=one.name)


def _limit(subject: Subject, one: Loaded) -> float:
    """Largest relative error of a parameter; of one that no FP8 code went into, 0."""
    if not one.quantized:
        return 0.0
    by_powers = any(spec.format == FP8_BY_POWERS for spec in subject.specs.values())
    return (FP8_BY_POWERS if by_powers else FP8).rel_l2[1]
