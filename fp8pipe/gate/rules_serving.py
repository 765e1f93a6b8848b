"""Rules about serving: as fast and as small in memory as the policy asks, from the figures of both reports."""

from __future__ import annotations

import math
from collections.abc import Callable

from fp8pipe.gate.evidence import Evidence, Outcome, passed, unchecked, vetoed


def speed(evidence: Evidence) -> Outcome:
    """The candidate generates tokens as much faster than the baseline as the policy asks."""
    return _limited(evidence, "speed", evidence.policy.min_speedup, _speed)


def memory(evidence: Evidence) -> Outcome:
    """The candidate's weights take as little of the engine's memory as the policy asks."""
    return _limited(evidence, "memory", evidence.policy.max_memory_ratio, _memory)


def _limited(
    evidence: Evidence, what: str, limit: float | None, judge: Callable[[Evidence, float], Outcome]
) -> Outcome:
    if limit is None:
        return passed(f"policy {evidence.policy.name} sets no {what} limit")
    return _doubt(evidence) or judge(evidence, limit)


def _speed(evidence: Evidence, limit: float) -> Outcome:
    sides = [side.serving for side in (evidence.baseline, evidence.candidate)]
    before, after = (figures.output_throughput if figures is not None else 0.0 for figures in sides)
    if not (before > 0 and after > 0 and math.isfinite(after / before)):
        return unchecked(f"no generated tokens were timed: {before:g} and {after:g} per second; measure again")
    ratio = after / before
    reason = f"{before:,.0f} -> {after:,.0f} generated tokens per second, {ratio:.3f} times the baseline's"
    if ratio >= limit:
        return passed(f"{reason}, at least {limit:g}")
    return vetoed(f"{reason} is below the limit {limit:g}")


def _memory(evidence: Evidence, limit: float) -> Outcome:
    before, after = (side.engine.model_bytes or 0 for side in (evidence.baseline, evidence.candidate))
    if not (before > 0 and after > 0):
        return unchecked("the weights' bytes in memory are not recorded on both sides; measure again")
    reason = f"{before} -> {after} bytes of weights in memory, ratio {after / before:.3f}"
    if after / before <= limit:
        return passed(f"{reason}, limit {limit:g}")
    return vetoed(f"{reason} is above the limit {limit:g}")


def _doubt(evidence: Evidence) -> Outcome | None:
    """Why the two sides' figures cannot be set against each other; None where they can."""
    ours, theirs = evidence.baseline, evidence.candidate
    missing = [side.role for side in (ours, theirs) if side.serving is None]
    if ours.serving is None or theirs.serving is None:
        return unchecked(f"not timed: {' and '.join(missing)}; add `serving: {{}}` to the suite and measure again")
    if ours.serving.workload != theirs.serving.workload:
        return vetoed(f"timed on different workloads: {ours.serving.workload} and {theirs.serving.workload}")
    if not (ours.serving.comparable and theirs.serving.comparable):
        device = theirs.engine.device_class
        return unchecked(f"taken on {device}, where figures say nothing about serving; measure both sides on a GPU")
    if ours.engine.device_name != theirs.engine.device_name:
        devices = f"{ours.engine.device_name} and {theirs.engine.device_name}"
        return unchecked(f"timed on two kinds of device, {devices}; measure both sides on one")
    return None
