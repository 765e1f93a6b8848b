"""What the module proof must find, in real vLLM models.

Two of the faults are vLLM's own: it requantizes scales that differ within a fused projection, and it does not find the
names of one vision tower in an ignore list.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import TESTS
from support.evaluation import make_fp8_kv_twin
from support.processes import importing_the_repository
from support.reports import checkpoint, pair, policy, recipe, suite

from benchmarks.zoo.models import build, save
from benchmarks.zoo.rows import examine
from fp8pipe.config import load_recipe
from fp8pipe.gate import decide
from fp8pipe.gate.modules import compare_modules
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import make_plan
from fp8pipe.records import ModuleProof

pytestmark = pytest.mark.vllm

Proofs = dict[str, ModuleProof]


@pytest.fixture(scope="module")
def proofs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Proofs:
    root = tmp_path_factory.mktemp("modules")
    folders = [
        *(tiny_llama, make_fp8_kv_twin(tiny_llama, root / "twin")),
        *(source_and_fp8("qwen3_moe", root) + source_and_fp8("blip-2", root)),
    ]
    script, answer = TESTS / "support" / "module_cases.py", root / "proofs.json"
    command = [sys.executable, script, *folders, answer]
    run = subprocess.run(command, env=importing_the_repository(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return {name: ModuleProof.model_validate(proof) for name, proof in json.loads(answer.read_text()).items()}


def source_and_fp8(name: str, root: Path) -> list[Path]:
    """A model of the zoo, in which the second expert of each layer is three times as large, and its checkpoint."""
    model, source = build(name), root / name / "source"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3 and len(parameter) == 4:
                parameter[1] *= 3
    save(model, source, name)
    snapshot = resolve(str(source))
    plan = make_plan(snapshot, read_headers(snapshot), load_recipe("fp8-dynamic"), examine(snapshot))
    quantize(snapshot, plan, source.with_name("fp8"))
    return [source, source.with_name("fp8")]


def reason_of(ours: ModuleProof, theirs: ModuleProof) -> str:
    """Why the rule vetoes, and no other; empty if it passes."""
    baseline, candidate = pair()
    sides = baseline.model_copy(update={"proof": ours}), candidate.model_copy(update={"proof": theirs})
    decision = decide(*sides, policy(), suite=suite(2000), checkpoint=checkpoint(), recipe=recipe())
    assert set(decision.vetoed) <= {"modules"}
    [ruling] = [rule for rule in decision.rules if rule.rule == "modules"]
    return ruling.reason if ruling.outcome == "vetoed" else ""


def test_experts_and_linears_that_are_right_pass_and_are_within_half_of_their_bounds(proofs: Proofs) -> None:
    assert reason_of(proofs["moe"], proofs["fp8 moe"]) == ""
    compared = compare_modules(proofs["moe"], proofs["fp8 moe"])
    assert len(compared) == len(proofs["moe"].modules) > 8
    assert {one.candidate.kind for one in compared if one.candidate.scheme} == {"linear", "experts"}
    for one in compared:
        assert one.error < (0.55 * one.bound if one.candidate.scheme else 1e-6), one.place
        assert one.stored_error is None or one.stored_error < 0.9 * one.stored_bound, one.place
    assert all(one.stored_error is not None for one in compared if one.candidate.scheme)


def test_a_vision_tower_with_unfilled_scales(proofs: Proofs) -> None:
    reason = reason_of(proofs["tower"], proofs["unfilled"])
    assert re.search(r"quantized modules are further from the baseline .*vision_model\.encoder\.layers\.\d", reason)


def test_transposed_experts(proofs: Proofs) -> None:
    assert re.search(r"experts\.routed_experts, expert \d by 1", reason_of(proofs["moe"], proofs["transposed"]))


def test_one_expert_with_anothers_scale(proofs: Proofs) -> None:
    reason = reason_of(proofs["moe"], proofs["another's scale"])
    assert "1 quantized modules are further from" in reason
    assert "model.layers.1.mlp.experts.routed_experts, expert 1 by 0." in reason


def test_scales_requantized_at_load(proofs: Proofs) -> None:
    """By vLLM, because q, k and v have one scale each; the errors against the baseline alone would not show it."""
    compared = compare_modules(proofs["llama"], proofs["twin"])
    assert all(one.error < one.bound for one in compared)
    reason = reason_of(proofs["llama"], proofs["twin"])
    assert re.search(
        r"do not answer with the weights and scales that were loaded: .*(qkv|gate_up)_proj by 0\.02", reason
    )
    assert "o_proj" not in reason and "down_proj" not in reason


def test_a_layer_silently_served_in_16_bits(proofs: Proofs) -> None:
    reason = reason_of(proofs["llama"], proofs["16 bits"])
    assert (
        "1 modules are served in 16 bits and differ from the baseline: model.layers.1.mlp.down_proj by 0.02" in reason
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "where"),
    [
        ("llama", "gate and up", "model.layers.1.mlp.gate_up_proj by 1"),
        ("moe", "experts' gate and up", "model.layers.1.mlp.experts.routed_experts, expert 2 by"),
    ],
)
def test_exchanged_gate_and_up(proofs: Proofs, ours: str, theirs: str, where: str) -> None:
    assert where in reason_of(proofs[ours], proofs[theirs])


def test_a_proof_is_the_same_each_time(proofs: Proofs) -> None:
    one, other = (
        {module.name: module.outputs for module in proofs[name].modules if "layers.0" in module.name}
        for name in ("fp8 moe", "transposed")
    )
    assert one == other
