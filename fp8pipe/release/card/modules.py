"""The layers of the engine's model, one by one: how far they are from the baseline's."""

from __future__ import annotations

from fp8pipe.gate.modules import Compared, compare_modules
from fp8pipe.release.card.facts import CardFacts

SHOWN = 10
_WIDTH = 46
"""Letters of a layer's name, so that the table fits into 80 columns."""


def worst_modules(facts: CardFacts) -> list[dict[str, str]]:
    """The quantized layers nearest to their bounds; empty without a proof on both sides."""
    return [
        {
            "layer": _short(one.place),
            "off by": _percent(one.error),
            "bound": _percent(one.bound),
            "loaded": "-" if one.stored_error is None else _percent(one.stored_error),
        }
        for one in _quantized(facts)[:SHOWN]
    ]


def modules_note(facts: CardFacts) -> str:
    """What was run, and how much of it is quantized; empty without a proof on both sides."""
    proof, quantized = facts.candidate.proof, _quantized(facts)
    if proof is None or not quantized:
        return ""
    schemes = sorted({one.candidate.scheme for one in quantized})
    return (
        f"Before the first prompt, each of the {len(proof.modules):,} Linears and expert layers of vLLM's model ran on "
        f"a seeded input, through the kernel that serves it ({'; '.join(schemes)}), and its output was compared with "
        f"the BF16 model's. {len(quantized):,} of them are quantized; the others differ by less than 1 %."
    )


def _quantized(facts: CardFacts) -> list[Compared]:
    """The worst first."""
    ours, theirs = facts.baseline.proof, facts.candidate.proof
    if ours is None or theirs is None:
        return []
    return [one for one in compare_modules(ours, theirs) if one.candidate.scheme]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _short(place: str) -> str:
    """The end of the name, if it is long: it says which layer."""
    return place if len(place) <= _WIDTH else f"…{place[1 - _WIDTH :]}"
