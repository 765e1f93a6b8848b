"""The gate's self-test: each damage does what it says, the judge can say no, and the measured cases still hold.

`python -m benchmarks.damages` measures the cases, and keeps its counts beside its page.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import reference_checkpoints as reference
from support.reports import checkpoint, flipped, metric, recipe, report, task, values

from benchmarks.damages import (
    COUNTS,
    DAMAGES,
    ITSELF,
    LINEAR,
    PAGE,
    Case,
    Cases,
    Counts,
    is_right,
    page_text,
    right_verdicts,
    spoilt,
)
from fp8pipe.config import load_policy
from fp8pipe.gate import decide
from fp8pipe.records import GateDecision
from fp8pipe.rehearsal.demo import model

MEASURED = Cases.load(COUNTS)

# ---------------------------------------------------------------------------------------------- the measured cases


def judged(case: Case) -> GateDecision:
    """The decision of the present gate on the answers that were counted."""
    seen = case.task
    assert seen.discordant_lost is not None and seen.discordant_won is not None
    ours = values(round(seen.baseline * seen.n), seen.n)
    theirs = flipped(ours, lost=seen.discordant_lost, won=seen.discordant_won)
    baseline, candidate = (
        task(side, name=seen.task, metrics=(metric(side, name=seen.metric, filter=seen.filter),))
        for side in (ours, theirs)
    )
    return decide(
        report(baseline),
        report(candidate, candidate=True, tokenizer_hash=("c" if case.same_tokenizer else "e") * 64),
        load_policy("demo"),
        checkpoint=checkpoint(),
        recipe=recipe(),
    )


def test_every_damage_was_measured_on_enough_questions_to_tell_the_truth() -> None:
    named = [(damage.name, damage.expected) for damage in DAMAGES]
    assert [(case.damage, case.expected) for case in MEASURED.cases] == [(ITSELF, "accepted"), *named]
    assert all(case.task.n == 2000 for case in MEASURED.cases)
    assert all(case.truth.n == (20_000 if case.expected == "truth" else 2000) for case in MEASURED.cases[1:])


@pytest.mark.parametrize("case", MEASURED.cases, ids=lambda case: case.damage)
def test_gate_says_of_a_known_damage_what_it_should(case: Case) -> None:
    decision = judged(case)
    (seen,) = decision.tasks
    assert (decision.verdict, seen.verdict) == (case.verdict, case.task.verdict)
    assert (seen.drop_lower, seen.drop_upper) == pytest.approx((case.task.drop_lower, case.task.drop_upper), abs=1e-9)
    assert is_right(case.model_copy(update={"task": seen, "vetoed": decision.vetoed}))


def test_page_shows_the_measured_cases() -> None:
    assert PAGE.read_text() == page_text(MEASURED)


# ---------------------------------------------------------------------------------------------- the judge

ABOVE, BELOW, AROUND = (Counts(n=20_000, lost=lost, won=100) for lost in (700, 300, 500))


@pytest.mark.parametrize(
    ("truth", "verdicts"),
    [
        (ABOVE, {"rejected", "inconclusive"}),
        (BELOW, {"accepted", "inconclusive"}),
        (AROUND, {"accepted", "inconclusive", "rejected"}),
    ],
)
def test_truth_forbids_only_what_it_contradicts(truth: Counts, verdicts: set[str]) -> None:
    sample = next(case for case in MEASURED.cases if case.expected == "truth")
    for verdict in ("accepted", "inconclusive", "rejected"):
        update = {"verdict": verdict, "vetoed": (), "truth": truth}
        update["task"] = sample.task.model_copy(update={"verdict": verdict})
        case = sample.model_copy(update=update)
        assert (verdict in right_verdicts(case)) == is_right(case) == (verdict in verdicts)


def test_a_verdict_for_another_reason_is_not_as_it_should_be() -> None:
    by_name = {case.damage: case for case in MEASURED.cases}
    rejected, vetoed = by_name["one weight scale x4"], by_name["wrong BOS token in front of prompts"]
    assert is_right(rejected) and is_right(vetoed)
    accepted = rejected.task.model_copy(update={"verdict": "accepted"})
    assert not is_right(rejected.model_copy(update={"task": accepted}))  # by a veto, not by its numbers
    assert not is_right(vetoed.model_copy(update={"vetoed": ("truncation",)}))


# ---------------------------------------------------------------------------------------------- the damages


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damages")
    folder = reference.quantize(reference.llama(root / "source"), root / "sound", kv="tensor")
    model.build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("none", set()),
        ("one weight scale x1.5", {f"{LINEAR}.weight_scale"}),
        ("one weight scale x4", {f"{LINEAR}.weight_scale"}),
        ("the codes of one Linear shuffled", {f"{LINEAR}.weight"}),
        ("every k_scale 10 times too small", {f"model.layers.{i}.self_attn.k_scale" for i in range(2)}),
        ("lm_head quantized, one scale per tensor", {"lm_head.weight", "lm_head.weight_scale"}),
        ("wrong BOS token in front of prompts", set()),
    ],
)
def test_damage_changes_what_it_says_and_nothing_else(
    sound: Path, tmp_path: Path, name: str, changed: set[str]
) -> None:
    (damage,) = [damage for damage in DAMAGES if damage.name == name]
    folder = spoilt(sound, damage, tmp_path / "spoilt")
    before, after = reference.read(sound)[0], reference.read(folder)[0]
    assert before.keys() <= after.keys()
    differing = {key for key in after if key not in before or as_bytes(before[key]) != as_bytes(after[key])}
    assert differing == changed
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()


def as_bytes(tensor: torch.Tensor) -> tuple[torch.dtype, bytes]:
    return tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()


def spoilt_by(name: str, sound: Path, folder: Path) -> Path:
    return spoilt(sound, next(damage for damage in DAMAGES if damage.name == name), folder)


def test_shuffled_codes_are_the_same_codes_in_other_places(sound: Path, tmp_path: Path) -> None:
    folder = spoilt_by("the codes of one Linear shuffled", sound, tmp_path / "spoilt")
    one, other = (reference.read(place)[0][f"{LINEAR}.weight"].view(torch.uint8).flatten() for place in (sound, folder))
    assert torch.equal(one.sort().values, other.sort().values)
    assert (one != other).float().mean() > 0.8


def test_quantized_head_is_within_half_a_step_and_targeted_by_name(sound: Path, tmp_path: Path) -> None:
    folder = spoilt_by("lm_head quantized, one scale per tensor", sound, tmp_path / "spoilt")
    tensors, config = reference.read(folder)
    head = reference.read(sound)[0]["lm_head.weight"].float()
    scale = tensors["lm_head.weight_scale"]
    units = head / scale
    half_step = torch.exp2(torch.floor(torch.log2(units.abs().clamp(min=2.0**-6))) - 3) / 2
    assert bool(((tensors["lm_head.weight"].float() - units).abs() <= half_step).all())
    settings = config["quantization_config"]
    assert settings["ignore"] == []
    assert [group["targets"] for group in settings["config_groups"].values()] == [["Linear"], ["re:.*lm_head"]]


def test_wrong_bos_stands_where_the_right_one_was(sound: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = spoilt_by("wrong BOS token in front of prompts", sound, tmp_path / "spoilt")
    right, wrong = (AutoTokenizer.from_pretrained(place)("ant>cow ? ant")["input_ids"] for place in (sound, folder))
    assert (right[0], wrong[0]) == (model.BOS, model.EOS)
    assert right[1:] == wrong[1:]
    asked = AutoTokenizer.from_pretrained(folder, add_bos_token=True)  # as lm-eval asks
    assert asked("ant>cow ? ant")["input_ids"] == wrong
