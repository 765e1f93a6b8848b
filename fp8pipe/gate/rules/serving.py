"""Rules about serving: speed and memory against the policy's limits, from the figures in both reports."""

from __future__ import annotations

import math
from collections.abc import Callable

from fp8pipe.gate.rules.pair import Pair, Ruling, passed, unchecked, vetoed


def speed(pair: Pair) -> Ruling:
    """The candidate generates at least `min_speedup` times as many tokens per second as the baseline."""
    return _limited(pair, "speed", pair.policy.min_speedup, _speed)


def memory(pair: Pair) -> Ruling:
    """The candidate's weights take at most `max_memory_ratio` of the memory that the baseline's take."""
    return _limited(pair, "memory", pair.policy.max_memory_ratio, _memory)


def _limited(pair: Pair, what: str, limit: float | None, judge: Callable[[Pair, float], Ruling]) -> Ruling:
    if limit is None:
        return passed(f"policy {pair.policy.name} sets no {what} limit")
    return _incomparable(pair) or judge(pair, limit)


def _speed(pair: Pair, limit: float) -> Ruling:
    sides = [side.serving for side in (pair.baseline, pair.candidate)]
    before, after = (figures.output_throughput if figures is not None else 0.0 for figures in sides)
    if not (before > 0 and after > 0 and math.isfinite(after / before)):
        return unchecked(f"no generated tokens were timed: {before:g} and {after:g} per second; measure again")
    ratio = after / before
    reason = f"{before:,.0f} -> {after:,.0f} generated tokens per second, {ratio:.3f} times the baseline's"
    if ratio >= limit:
        return passed(f"{reason}, at least {limit:g}")
    return vetoed(f"{reason} is below the limit {limit:g}")


def _memory(pair: Pair, limit: float) -> Ruling:
    before, after = (side.engine.model_bytes or 0 for side in (pair.baseline, pair.candidate))
    if not (before > 0 and after > 0):
        return unchecked("the memory taken by the weights is not recorded on both sides; measure again")
    reason = f"{before} -> {after} bytes of weights in memory, ratio {after / before:.3f}"
    if after / before <= limit:
        return passed(f"{reason}, limit {limit:g}")
    return vetoed(f"{reason} is above the limit {limit:g}")


def _incomparable(pair: Pair) -> Ruling | None:
    """The ruling where the two sides' figures cannot be compared; None where they can."""
    ours, theirs = pair.baseline, pair.candidate
    missing = [side.role for side in (ours, theirs) if side.serving is None]
    if ours.serving is None or theirs.serving is None:
        return unchecked(f"not timed: {' and '.join(missing)}; add `serving: {{}}` to the suite and measure again")
    if ours.serving.workload != theirs.serving.workload:
        return vetoed(f"timed on different workloads: {ours.serving.workload} and {theirs.serving.workload}")
    if not (ours.serving.comparable and theirs.serving.comparable):
        device = theirs.engine.device_class
        return unchecked(f"timed on {device}, which says nothing about serving; measure both sides on a GPU")
    if ours.engine.device_name != theirs.engine.device_name:
        devices = f"{ours.engine.device_name} and {theirs.engine.device_name}"
        return unchecked(f"timed on different devices, {devices}; measure both sides on one")
    return None
