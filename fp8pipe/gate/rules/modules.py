"""The rule about modules: every layer of the engine's model answers as the baseline's does, through its own kernel."""

from __future__ import annotations

from collections.abc import Iterator

from fp8pipe.gate.modules import Compared, by_key, compare_modules
from fp8pipe.gate.rules.pair import Pair, Ruling, few, settled, unchecked
from fp8pipe.records import ModuleProof


def modules(pair: Pair) -> Ruling:
    """Every Linear and expert layer is on both sides, and as close to the baseline's as its scheme allows."""
    ours, theirs = pair.baseline.proof, pair.candidate.proof
    if ours is None or theirs is None:
        missing = [side.role for side in (pair.baseline, pair.candidate) if side.proof is None]
        return unchecked(
            f"the modules were not run one by one: {' and '.join(missing)}; measure with `fp8pipe evaluate`"
        )
    if ours.version != theirs.version:
        return unchecked("the modules were run by two versions of fp8pipe; measure both sides again")
    compared = compare_modules(ours, theirs)
    problems = [
        *_one_sided(ours, theirs),
        *_run_once(ours, theirs),
        *_faults(ours, theirs),
        *_far_off(compared),
        *_changed(compared),
    ]
    return settled(problems, _summary(compared, len(theirs.modules) - len(compared)))


def _one_sided(ours: ModuleProof, theirs: ModuleProof) -> Iterator[str]:
    one, other = by_key(ours), by_key(theirs)
    for side, names in (("baseline", one.keys() - other.keys()), ("candidate", other.keys() - one.keys())):
        if names:
            yield f"{len(names)} modules are only in the {side}: {few(sorted(name for _, name in names))}"


def _run_once(ours: ModuleProof, theirs: ModuleProof) -> Iterator[str]:
    one, other = by_key(ours), by_key(theirs)
    found = [key for key in sorted(one.keys() & other.keys()) if bool(one[key].outputs) != bool(other[key].outputs)]
    silent = [key[1] for key in found if not (one[key].fault or other[key].fault)]
    if silent:
        yield f"{len(silent)} modules have weights of their own on one side only: {few(silent)}"


def _faults(ours: ModuleProof, theirs: ModuleProof) -> Iterator[str]:
    for role, proof in (("baseline", ours), ("candidate", theirs)):
        found = [f"{one.name} ({one.fault})" for one in proof.modules if one.fault]
        if found:
            yield f"{role}: {len(found)} modules cannot be relied on: {few(found)}"


def _far_off(compared: tuple[Compared, ...]) -> Iterator[str]:
    wrong = [one for one in compared if not one.error <= one.bound]
    kept = [one for one in wrong if not one.candidate.scheme]
    for what, group in (
        ("modules are served in 16 bits and differ from the baseline", kept),
        (
            "quantized modules are further from the baseline than their scheme allows",
            [o for o in wrong if o not in kept],
        ),
    ):
        if group:
            yield f"{len(group)} {what}: {few(f'{one.place} by {one.error:.2g}, bound {one.bound:g}' for one in group)}"


def _changed(compared: tuple[Compared, ...]) -> Iterator[str]:
    wrong = [one for one in compared if one.stored_error is not None and not one.stored_error <= one.stored_bound]
    if wrong:
        listed = few(f"{one.place} by {one.stored_error:.2g}, bound {one.stored_bound:g}" for one in wrong)
        yield f"{len(wrong)} modules do not answer with the weights and scales that were loaded: {listed}"


def _summary(compared: tuple[Compared, ...], taken: int) -> str:
    quantized = [one for one in compared if one.candidate.scheme]
    text = f"all {len(compared)} modules are as close to the baseline as their scheme allows"
    if taken:
        text += f" ({taken} more are no modules of their own in this engine)"
    if not quantized:
        return text
    worst = max(quantized, key=lambda one: one.error)
    return f"{text}; the furthest of the {len(quantized)} quantized ones is {worst.place}, by {worst.error:.2g}"
