"""The module proofs of two reports, layer by layer: how far the candidate's outputs are from the baseline's.

In: two ModuleProofs of one version. Out: a `Compared` for each layer that both have, with the bound of its scheme. The
bounds are measured (docs/gate.md, `python -m benchmarks.modules`) and leave room.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fp8pipe.records import ModuleOutput, ModuleProof

Key = tuple[int, str]
"""Rank and name."""

KEPT, LINEAR, EXPERTS = 0.01, 0.06, 0.2
"""Largest relative errors against the baseline: of a layer that is not quantized, of a quantized Linear, whose input is
exact so that only its weights are not, and of any single expert, whose second product has inputs that are not."""

STORED_LINEAR, STORED_EXPERTS, STORED_STATIC = 0.01, 0.034, 0.1
"""Largest relative errors against the weights and scales as they were loaded: of a Linear, of experts whose inputs are
quantized by what they are, and of experts with static scales, which a seeded input does not fill."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One layer on both sides."""

    candidate: ModuleOutput
    error: float
    """Relative error of its outputs against the baseline's; of experts, that of the worst. Infinite if not finite."""
    expert: int | None
    """The worst of the experts that the worker holds; None for a Linear."""
    bound: float
    """Of `error`."""
    stored_bound: float
    """Of the candidate's `stored_error`."""

    @property
    def stored_error(self) -> float | None:
        """Relative error against the weights and scales as they were loaded; None if unknown."""
        return self.candidate.stored_error

    @property
    def place(self) -> str:
        """Its name, with the expert and the rank where there are several."""
        expert = "" if self.expert is None else f", expert {self.expert}"
        return f"{self.candidate.name}{expert}{f' on rank {self.candidate.rank}' if self.candidate.rank else ''}"


def by_key(proof: ModuleProof) -> dict[Key, ModuleOutput]:
    """Every layer of a proof."""
    return {(one.rank, one.name): one for one in proof.modules}


def compare_modules(baseline: ModuleProof, candidate: ModuleProof) -> tuple[Compared, ...]:
    """Every layer that answered on both sides, the worst first."""
    found = sorted(_compared(baseline, candidate), key=lambda one: -one.error / one.bound)
    return tuple(found)


def _compared(baseline: ModuleProof, candidate: ModuleProof) -> Iterator[Compared]:
    ours, theirs = by_key(baseline), by_key(candidate)
    for key in ours.keys() & theirs.keys():
        before, after = ours[key], theirs[key]
        if before.outputs and after.outputs:
            errors = _errors(before, after)
            worst = max(range(len(errors)), key=errors.__getitem__)
            expert = worst if after.kind == "experts" else None
            yield Compared(after, errors[worst], expert, *_bounds(after))


def _errors(before: ModuleOutput, after: ModuleOutput) -> list[float]:
    """Relative error of each expert, at the level that the candidate's static scales hold."""
    import numpy as np

    if before.shape != after.shape:
        return [math.inf]
    one, other = (side.numbers()[:, after.level] for side in (before, after))
    with np.errstate(all="ignore"):
        distance = np.linalg.norm(other - one, axis=1)
        errors = np.where(distance == 0, 0.0, distance / np.linalg.norm(one, axis=1))
    return np.where(np.isfinite(errors), errors, math.inf).tolist()


def _bounds(module: ModuleOutput) -> tuple[float, float]:
    if not module.scheme:
        return KEPT, math.inf
    if module.kind == "linear":
        return LINEAR, STORED_LINEAR
    return EXPERTS, STORED_STATIC if module.static else STORED_EXPERTS
