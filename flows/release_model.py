"""One model, one recipe: from a name on the Hub to a published FP8 release, or the reason why not."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from fp8pipe import stages
from fp8pipe.config import ReleaseSpec, ResolvedRelease
from fp8pipe.quantize import fingerprint
from fp8pipe.records import GateDecision, Outcome, Snapshot
from fp8pipe.release.workspace import ReleaseFolder, Workspace
from tasks.evaluate import evaluate_baseline, evaluate_candidate
from tasks.gate import ask, gate, plan_evaluation
from tasks.publish import publish
from tasks.quantize import calibrate, quantize
from tasks.source import download, pin, plan
from tasks.validate import validate

STATE_NAMES = {
    "released": "Released",
    "accepted": "Accepted",
    "rejected": "Rejected",
    "inconclusive": "Inconclusive",
    "unsound": "Unsound",
}
"""A verdict against the model is a completed run with a name of its own: nothing crashed."""


@flow(name="release-model", flow_run_name="{spec.model} {spec.recipe}")
def release_model(spec: ReleaseSpec) -> State[Outcome]:
    """Quantize `spec.model`, prove it, measure it against its own baseline, gate it, publish it if accepted.

    What the gate's numbers reject is tried again with the recipe's next fallback.
    """
    job = spec.resolve()
    workspace = Workspace(Path(spec.work_dir).resolve())
    plan_evaluation(job, workspace)
    snapshot = pin(spec.model)

    path: list[Outcome] = []
    for rung in job.ladder():
        path.append(_attempt(rung, snapshot, workspace, path))
        if not path[-1].falls_back:
            break
    outcome = path[-1]
    return Completed(name=STATE_NAMES[outcome.ending], message=outcome.reason, data=outcome)


def _attempt(job: ResolvedRelease, snapshot: Snapshot, workspace: Workspace, path: list[Outcome]) -> Outcome:
    """One recipe, all the way."""
    spec, recipe = job.spec, job.recipe
    layout = plan(snapshot, recipe, spec.trust_remote_code)
    ranges = None
    if recipe.needs_calibration:
        snapshot = download(snapshot, spec.trust_remote_code)
        ranges = calibrate(snapshot, layout, recipe, workspace, spec.device)
    identity = fingerprint(snapshot, recipe, ranges.digest() if ranges else None)
    folder = workspace.release(snapshot.model_id, recipe.name, identity)
    checkpoint, snapshot = quantize(snapshot, layout, folder.checkpoint, ranges)

    report = validate(folder.checkpoint, snapshot, recipe.name)
    if not report.sound:
        return stages.unsound(job, snapshot, checkpoint, report).kept(folder.outcome)

    decision = _decide(job, snapshot, folder, workspace, path)
    release = None
    if stages.may_publish(folder.checkpoint):
        release = publish(folder.checkpoint, spec.repo_id, spec.collection)
    elif stages.is_question(decision, job.policy):
        ask(job, folder.checkpoint, decision)
    return stages.decided(job, snapshot, checkpoint, decision, release).kept(folder.outcome)


def _decide(
    job: ResolvedRelease, snapshot: Snapshot, folder: ReleaseFolder, workspace: Workspace, path: list[Outcome]
) -> GateDecision:
    """Look after look, until the samples settle it or there are no more."""
    for look in job.policy.schedule:
        baseline = evaluate_baseline(snapshot, job.suite, workspace, job.policy.looks, look)
        candidate = evaluate_candidate(folder.checkpoint, job, folder.evaluation, baseline, look)
        decision = gate(baseline, candidate, job, folder.checkpoint, look, path)
        if decision.final:
            return decision
    raise AssertionError("the last look is final")
