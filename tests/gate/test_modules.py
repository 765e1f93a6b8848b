"""The rule `modules`: a layer that is missing, not finite, too far off or changed at load vetoes, and is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.reports import MODULES, checkpoint, module, pair, policy, proof, recipe, suite

from fp8pipe.gate import decide
from fp8pipe.gate.modules import compare_modules
from fp8pipe.records import GateDecision, ModuleOutput, ModuleProof

QKV, DOWN, EXPERTS, HEAD = MODULES
FP8 = "CompressedTensorsW8A8Fp8, SomeFp8Kernel"


def decided(ours: ModuleProof | None, theirs: ModuleProof | None) -> GateDecision:
    baseline, candidate = pair()
    sides = baseline.model_copy(update={"proof": ours}), candidate.model_copy(update={"proof": theirs})
    return decide(*sides, policy(), suite=suite(2000), checkpoint=checkpoint(), recipe=recipe())


def test_layers_as_far_from_the_baseline_as_their_scheme_costs_pass_and_the_worst_is_named() -> None:
    decision = decided(proof(), proof(candidate=True))
    assert (decision.verdict, decision.vetoed, decision.unchecked) == ("accepted", (), ())
    [reason] = [rule.reason for rule in decision.rules if rule.rule == "modules"]
    assert "all 4 modules" in reason and f"{EXPERTS}, expert" in reason


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"qkv_proj": module(QKV, scheme=FP8, off=0.1)}, f"{QKV} by 0.1, bound 0.06"),
        (
            {"lm_head": module(HEAD, off=0.026)},
            f"1 modules are served in 16 bits and differ from the baseline: {HEAD} by 0.02",
        ),
        ({"down_proj": module(DOWN, scheme=FP8, off=float("inf"))}, f"{DOWN} by inf"),
        ({"down_proj": module(DOWN, scheme=FP8, fault="KeyError: no kernel")}, f"{DOWN} (KeyError: no kernel)"),
        ({"down_proj": module("other", scheme=FP8)}, f"1 modules are only in the baseline: {DOWN}"),
        ({"down_proj": module(DOWN, scheme=FP8, experts=2)}, f"{DOWN}, expert 0 by inf"),
        (
            {"qkv_proj": module(QKV, scheme=FP8, off=0.037, stored_error=0.026)},
            f"do not answer with the weights and scales that were loaded: {QKV} by 0.026, bound 0.01",
        ),
        (
            {"experts": module(EXPERTS, scheme=FP8, off=0.06, experts=3, stored_error=0.04)},
            "by 0.04, bound 0.034",
        ),
    ],
)
def test_what_a_layer_must_not_be_vetoes_and_is_named(changed: dict[str, Any], words: str) -> None:
    decision = decided(proof(), proof(candidate=True, **changed))
    assert decision.vetoed == ("modules",)
    assert words in decision.reason


def test_static_scales_of_experts_may_cost_more_between_their_products() -> None:
    static = module(EXPERTS, scheme=FP8, off=0.06, experts=3, stored_error=0.06, static=True)
    assert decided(proof(), proof(candidate=True, experts=static)).vetoed == ()


def test_one_expert_of_many_is_found_and_levels_that_its_scale_does_not_hold_do_not_count() -> None:
    good, bad = (module(EXPERTS, scheme=FP8, off=off, experts=40).numbers() for off in (0.05, 0.4))
    levels, one = good.copy(), good.copy()
    levels[:, 0] = bad[:, 0]  # clipped at the first level, right at the second
    one[17] = bad[17]
    assert compared(levels, level=1).error < 0.07 < 0.3 < compared(levels, level=0).error
    found = compared(one, level=0)
    assert (found.expert, found.place) == (17, f"{EXPERTS}, expert 17")
    assert found.error == pytest.approx(0.4, rel=0.1)


def compared(numbers: np.ndarray, level: int) -> Any:
    """The experts with these outputs against the baseline's."""
    theirs = encoded(module(EXPERTS, scheme=FP8, experts=40, level=level), numbers)
    sides = [ModuleProof(version=1, modules=(one,)) for one in (module(EXPERTS, experts=40), theirs)]
    return compare_modules(*sides)[0]


def encoded(like: ModuleOutput, numbers: np.ndarray) -> ModuleOutput:
    import base64

    halves = (np.ascontiguousarray(numbers).view(np.uint32) >> 16).astype("<u2")
    return like.model_copy(update={"outputs": base64.b64encode(halves.tobytes()).decode()})


def test_ranks_hold_different_parts_and_are_compared_each_with_its_own() -> None:
    ours = proof()
    second = [one.model_copy(update={"rank": 1}) for one in proof(candidate=True).modules]
    both = ModuleProof(version=1, modules=(*ours.modules, *(o.model_copy(update={"rank": 1}) for o in ours.modules)))
    bad = module(QKV, scheme=FP8, off=0.2, rank=1)
    theirs = ModuleProof(version=1, modules=(*proof(candidate=True).modules, bad, *second[1:]))
    assert f"{QKV} on rank 1 by 0.2" in decided(both, theirs).reason


def test_reports_without_a_proof_or_with_another_version_leave_the_rule_unchecked() -> None:
    assert decided(None, proof(candidate=True)).unchecked == ("modules",)
    newer = proof(candidate=True).model_copy(update={"version": 2})
    assert decided(proof(), newer).unchecked == ("modules",)
