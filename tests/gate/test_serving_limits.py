"""Limits on speed and memory: held where the figures count, unchecked where they do not."""

from __future__ import annotations

from typing import Any

import pytest
from support.decisions import decide_fully, vetoes_of
from support.reports import change_engine, pair, policy, timed

from fp8pipe.records import EvalReport


def served(
    speed: float = 130.0, memory: int | None = 1_100_000, both: dict[str, Any] | None = None, **theirs: Any
) -> tuple[EvalReport, EvalReport]:
    """Equal results, timed: 100 tokens per second and 2,000,000 bytes in the baseline."""
    baseline, candidate = pair()
    return timed(baseline, 100.0, **(both or {})), timed(candidate, speed, memory, **(both or {}), **theirs)


LIMITS = policy(min_speedup=1.2, max_memory_ratio=0.6)


def test_limits_on_speed_and_memory_pass_when_they_are_met_exactly() -> None:
    decision = decide_fully(*served(speed=120.0, memory=1_200_000), LIMITS)
    assert (decision.verdict, decision.unchecked) == ("accepted", ())
    reasons = {rule.rule: rule.reason for rule in decision.rules}
    assert reasons["speed"] == "100 -> 120 generated tokens per second, 1.200 times the baseline's, at least 1.2"
    assert reasons["memory"] == "2000000 -> 1200000 bytes of weights in memory, ratio 0.600, limit 0.6"


@pytest.mark.parametrize(
    ("rule", "sides", "reason"),
    [
        ("speed", served(speed=119.0), "1.190 times the baseline's is below the limit 1.2"),
        ("memory", served(memory=1_300_000), "ratio 0.650 is above the limit 0.6"),
    ],
)
def test_a_broken_limit_on_speed_or_memory_is_vetoed(
    rule: str, sides: tuple[EvalReport, EvalReport], reason: str
) -> None:
    assert vetoes_of(*sides, rules=LIMITS) == (rule,)
    assert reason in decide_fully(*sides, LIMITS).reason
    assert decide_fully(*sides).vetoed == ()  # a policy without limits


def test_sides_that_were_timed_on_different_workloads_are_vetoed() -> None:
    other = {"num_prompts": 64, "input_len": 8, "output_len": 128, "max_concurrency": 16, "seed": 1234}
    assert vetoes_of(*served(workload=other), rules=LIMITS) == ("speed", "memory")


@pytest.mark.parametrize("broken", [{"speed": 10.0, "memory": 9_000_000}, {}])
def test_figures_from_a_cpu_leave_the_limits_unchecked_even_if_they_break_them(broken: dict[str, Any]) -> None:
    sides = [
        change_engine(side, device_class="cpu", device_name="Some CPU")
        for side in served(**broken, both={"comparable": False})
    ]
    decision = decide_fully(*sides, policy(min_speedup=1.2, max_memory_ratio=0.6, device_classes=("cpu",)))
    assert (decision.vetoed, decision.unchecked) == ((), ("speed", "memory"))
    assert all("timed on cpu" in rule.reason for rule in decision.rules if rule.outcome == "unchecked")


def test_limits_without_figures_are_unchecked_and_say_what_to_do() -> None:
    baseline, candidate = served()
    untimed = decide_fully(baseline, candidate.model_copy(update={"serving": None}), LIMITS)
    assert untimed.unchecked == ("speed", "memory")
    assert "not timed: candidate; add `serving: {}` to the suite" in untimed.rules[-1].reason
    elsewhere = decide_fully(baseline, change_engine(candidate, device_name="NVIDIA H200"), LIMITS)
    assert elsewhere.unchecked == ("speed", "memory")
    assert decide_fully(*served(memory=None), LIMITS).unchecked == ("memory",)
    assert decide_fully(*served(speed=0.0), LIMITS).unchecked == ("speed",)
