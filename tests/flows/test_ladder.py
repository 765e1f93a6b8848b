"""The fallback ladder and the looks: the recipes tried, what each pays, what the card tells, one real release."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cards import facts_of, saved
from support.demo import RECIPE, Demo, hub_of, on_the_hub
from support.gated_folders import gated
from support.processes import FP8PIPE
from support.reports import checkpoint, pair, policy, recipe, suite
from support.tiny_models import make_model, plan_of

from fp8pipe import stages
from fp8pipe.config import ReleaseSpec, ResolvedRelease, load_recipe
from fp8pipe.errors import ConfigError, InputError, SourceChanged
from fp8pipe.evaluate import looks, request_for
from fp8pipe.gate import decide
from fp8pipe.hub.source import resolve
from fp8pipe.records import EarlierAttempt, Finding, GateDecision, Outcome, ValidationReport
from fp8pipe.records.paths import record_path
from fp8pipe.rehearsal.demo.model import BASE_ID
from fp8pipe.release.card import render_card
from fp8pipe.release.outcome import unsound
from fp8pipe.release.workspace import Workspace
from fp8pipe.ui.sheets import outcome_sheet


def job(fallback: tuple[Any, ...], *, max_attempts: int = 3, repo_id: str = "acme/tiny-FP8-KV") -> ResolvedRelease:
    first = load_recipe("fp8-static-kv").model_copy(update={"fallback": fallback})
    spec = ReleaseSpec(model="acme/tiny", repo_id=repo_id)
    return ResolvedRelease(spec, first, suite(2000), policy(max_attempts=max_attempts))


def test_a_ladder_is_the_recipe_then_named_recipes_and_changes_of_itself() -> None:
    rungs = job(({"keep_bf16": {"worst": "5%"}}, "fp8-dynamic")).ladder()
    assert [rung.recipe.name for rung in rungs] == ["fp8-static-kv", "fp8-static-kv-fallback-1", "fp8-dynamic"]
    assert [(rung.attempt, rung.attempts) for rung in rungs] == [(1, 3), (2, 3), (3, 3)]
    kept = rungs[1].recipe
    assert kept.keep_bf16 is not None
    assert kept.keep_bf16.worst == 0.05
    assert kept.kv_cache == rungs[0].recipe.kv_cache
    assert all(rung.recipe.fallback == () for rung in rungs[1:])


def test_a_ladder_has_no_more_rungs_than_the_policy_lets_try_and_alpha_is_split_over_those() -> None:
    rungs = job(("fp8-dynamic", "fp8-block"), max_attempts=2).ladder()
    assert [rung.recipe.name for rung in rungs] == ["fp8-static-kv", "fp8-dynamic"]
    assert rungs[0].attempts == 2
    assert [rung.attempts for rung in job(()).ladder()] == [1]


def test_gating_a_checkpoint_again_keeps_the_attempt_that_it_was(tmp_path: Path) -> None:
    baseline, candidate = pair()
    for side in (baseline, candidate):
        side.save(tmp_path / side.role / "report.json")
    folder = tmp_path / "checkpoint"
    saved(folder)
    rejected = EarlierAttempt(recipe="fp8-static-kv", fingerprint="a" * 64, reason="drop 5 points")
    decide(*pair(), policy(max_attempts=3), attempt=2, attempts=3, earlier=[rejected]).save(record_path(folder, "gate"))

    def gated(max_attempts: int) -> GateDecision:
        sides = (tmp_path / "baseline", tmp_path / "candidate")
        return stages.gate_reports(*sides, policy(max_attempts=max_attempts), checkpoint=folder)

    again = gated(3)
    assert (again.attempt, again.max_attempts, again.earlier) == (2, 3, (rejected,))
    with pytest.raises(InputError, match="attempt 2 of 3, but policy unit has max_attempts: 2"):
        gated(2)


def test_a_checkpoint_that_was_not_what_was_measured_is_not_gated(tmp_path: Path) -> None:
    for side in pair():
        side.model_copy(update={"folder_identity": "a" * 64}).save(tmp_path / side.role / "report.json")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(SourceChanged, match=r"checkpoint: not what .*candidate measured, or changed since then"):
        stages.gate_reports(tmp_path / "baseline", tmp_path / "candidate", policy(), checkpoint=folder)


def test_a_candidate_that_an_early_look_decided_is_gated_against_the_baseline_up_to_that_look(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    rules = policy(looks=(0.5, 1.0))
    asked = request_for(model, suite(2000), role="baseline", model_id="m", fingerprint="b" * 40, looks=rules.looks)
    sides = {look: pair(n, right=n * 9 // 10, lost=0, won=0) for look, n in ((1, 1000), (2, 2000))}
    for look, (baseline, _) in sides.items():
        looks.keep(tmp_path / "baseline", asked.up_to(look), baseline)
    looks.keep(tmp_path / "candidate", asked.up_to(1), sides[1][1])
    decision = stages.gate_reports(tmp_path / "baseline", tmp_path / "candidate", rules)
    assert decision.look == 1
    assert decision.baseline_report == sides[1][0].digest()
    looks.keep(tmp_path / "candidate", asked, sides[2][1])
    assert stages.gate_reports(tmp_path / "baseline", tmp_path / "candidate", rules).look == 2


def test_a_fallback_is_published_under_its_own_ending() -> None:
    rungs = job(("fp8-dynamic",)).ladder()
    assert [rung.spec.repo_id for rung in rungs] == ["acme/tiny-FP8-KV", "acme/tiny-FP8-dynamic"]
    chosen = job(("fp8-dynamic",), repo_id="acme/chosen").ladder()
    assert [rung.spec.repo_id for rung in chosen] == ["acme/chosen", "acme/chosen"]


@pytest.mark.parametrize("entry", ["fp9", {"weigths": {}}, {"keep_bf16": {"worst": "90%"}}])
def test_a_fallback_that_is_no_recipe_is_an_error_before_anything_starts(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"name": "mine", "fallback": [entry]}))
    with pytest.raises(ConfigError):
        ReleaseSpec(model="o/m", repo_id="o/m-FP8", recipe=str(path)).resolve()


def outcome(decision: GateDecision | None, verdict: str = "rejected") -> Outcome:
    fields = {"model_id": "m", "source_commit": "c", "suite": "s", "policy": "p", "fingerprint": "f" * 64}
    sizes = {"source_bytes": 2, "output_bytes": 1, "release": None}
    return Outcome.model_validate(
        {**fields, **sizes, "verdict": verdict, "reason": "", "recipe": "r", "decision": decision}
    )


def test_only_a_rejection_by_the_numbers_tries_the_next_recipe() -> None:
    evidence: dict[str, Any] = {"checkpoint": checkpoint(), "suite": suite(2000), "recipe": recipe()}
    by_numbers = decide(*pair(lost=150, won=20), policy(), **evidence)
    vetoed = decide(*pair(lost=150, won=20), policy(), **(evidence | {"suite": suite(2001)}))
    assert by_numbers.verdict == vetoed.verdict == "rejected"
    assert outcome(by_numbers).falls_back
    assert not outcome(vetoed).falls_back
    assert not outcome(None, "unsound").falls_back
    assert not outcome(decide(*pair(lost=70, won=35), policy(), **evidence), "inconclusive").falls_back


def test_what_the_plan_noted_is_told_with_the_release(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    plan = plan_of(source, load_recipe("fp8-dynamic")).model_copy(
        update={"notes": ("vLLM does not read the source as it is",)}
    )
    report = ValidationReport(
        folder_identity="",
        depth="headers",
        checks=(),
        findings=(Finding(check="R1", severity="error", expected="", found="", remedy=""),),
        tensors=0,
        bytes_read=0,
    )
    ended = unsound(job(()), resolve(str(source)), plan, checkpoint(), report)
    assert plan.notes[0] in outcome_sheet(ended).notes


def test_each_rung_pays_in_alpha_and_the_card_tells_the_way_there() -> None:
    earlier = (EarlierAttempt(recipe="fp8-static", fingerprint="a" * 64, reason="qa: drop 3.10 points"),)
    facts = facts_of()
    decision = decide(facts.baseline, facts.candidate, policy(max_attempts=2), attempt=2, attempts=2, earlier=earlier)
    assert decision.alpha_spent == pytest.approx(0.025)
    card = render_card(replace(facts, decision=decision))
    assert "the gate rejected recipe fp8-static: qa: drop 3.10 points" in card
    assert "attempt 2" in card


def test_an_open_look_leaves_no_verdict_behind_that_could_be_published(tmp_path: Path) -> None:
    rules = policy(looks=(0.5, 1.0))
    assert gated(tmp_path, lost=0, won=0).verdict == "accepted"
    (tmp_path / "fp8pipe" / "gate.json").unlink()
    sides = pair(1000, right=900, lost=35, won=18)
    first = stages.gate(*sides, rules, suite=suite(2000), checkpoint_folder=tmp_path, look=1)
    assert (first.verdict, first.final) == ("inconclusive", False)
    assert not (tmp_path / "fp8pipe" / "gate.json").exists()
    whole = stages.gate(*pair(lost=70, won=36), rules, suite=suite(2000), checkpoint_folder=tmp_path, look=2)
    assert whole.final
    assert (tmp_path / "fp8pipe" / "gate.json").exists()


# ---------------------------------------------------------------------------------------------- with real parts


@pytest.mark.vllm
@pytest.mark.prefect
@pytest.mark.long
def test_a_rejected_recipe_falls_back_to_one_that_an_early_look_accepts(demo: Demo, tmp_path: Path) -> None:
    """Ranges 16 times too small, as the sabotaged demo has them; then weights and activations that need no ranges."""
    from fp8pipe.config import load_policy

    content = RECIPE.model_dump(mode="json") | {"fallback": ["fp8-dynamic"]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    rules = load_policy("demo").model_dump(mode="json") | {"max_attempts": 2, "looks": [0.5, 1.0]}
    (tmp_path / "policy.yaml").write_text(json.dumps(rules))
    work, repo_id = tmp_path / "work", f"{BASE_ID}-ladder{RECIPE.repo_suffix}"
    arguments = ["--recipe", tmp_path / "recipe.yaml", "--suite", "demo", "--policy", tmp_path / "policy.yaml"]
    arguments += ["--repo-id", repo_id, "--work-dir", work]
    with hub_of(demo) as environment:
        spoil_calibration(environment, work)
        answer = subprocess.run(
            [str(FP8PIPE), "release", BASE_ID, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment | {"PREFECT_HOME": str(tmp_path / "prefect")},
            check=False,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        published = f"{BASE_ID}-ladder-FP8-dynamic"
        seen = on_the_hub(
            environment, f"seen['names'] = [m.id for m in api.list_models(author='{BASE_ID.split('/')[0]}')]"
        )
    assert published in seen["names"]
    assert repo_id not in seen["names"]
    by_recipe = {one.recipe: one for one in (Outcome.load(r.outcome) for r in Workspace(work).releases())}
    rejected, released = by_recipe[RECIPE.name], by_recipe["fp8-dynamic"]
    assert (rejected.verdict, released.verdict) == ("rejected", "accepted")
    for ended, attempt in ((rejected, 1), (released, 2)):
        assert ended.decision is not None
        assert (ended.decision.attempt, ended.decision.max_attempts, ended.decision.look) == (attempt, 2, 1)
        assert ended.decision.tasks[0].n == 1000
        assert ended.decision.alpha_spent == pytest.approx(0.05 / 4)
    assert released.decision is not None
    assert [one.recipe for one in released.decision.earlier] == [RECIPE.name]


def spoil_calibration(environment: dict[str, str], work: Path) -> None:
    """Put ranges 16 times too small where the release will look for its own."""
    program = f"""
from pathlib import Path
from fp8pipe import stages
from fp8pipe.calibrate import RECORD_NAME, calibration_key
from fp8pipe.config import load_recipe
from fp8pipe.release.workspace import Workspace
from fp8pipe.ui.sheets import outcome_sheet

recipe, workspace = load_recipe({RECIPE.name!r}), Workspace(Path({str(work)!r}))
snapshot = stages.pin({BASE_ID!r})
plan = stages.plan(snapshot, recipe)
snapshot = stages.download(snapshot)
honest = stages.calibrate(snapshot, plan, recipe, Workspace(Path({str(work)!r}) / "honest"), device="auto")
honest.scaled(1 / 16).save(workspace.calibration(calibration_key(snapshot, recipe, device="auto")) / RECORD_NAME)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | environment, capture_output=True)
