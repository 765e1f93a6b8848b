"""One model, one recipe: from a name on the Hub to a published FP8 release, or the reason why not."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from fp8pipe import stages
from fp8pipe.config import ReleaseSpec
from fp8pipe.quantize import fingerprint
from fp8pipe.records import Outcome
from fp8pipe.workspace import Workspace
from tasks.evaluate import evaluate_baseline, evaluate_candidate
from tasks.gate import gate
from tasks.publish import publish
from tasks.quantize import calibrate, quantize
from tasks.source import download, pin, plan
from tasks.validate import validate

STATE_NAMES = {"accepted": "Released", "rejected": "Rejected", "inconclusive": "Inconclusive", "unsound": "Unsound"}
"""A verdict against the model is a completed run with a name of its own: nothing crashed."""


@flow(name="release-model", flow_run_name="{spec.model} {spec.recipe}")
def release_model(spec: ReleaseSpec) -> State[Outcome]:
    """Quantize `spec.model`, prove it, measure it against its own baseline, gate it, publish it if accepted."""
    job = spec.resolve()
    recipe, workspace = job.recipe, Workspace(Path(spec.work_dir).resolve())

    snapshot = pin(spec.model)
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
        return _end(stages.unsound(job, snapshot, checkpoint, report), folder.outcome)

    baseline = evaluate_baseline(snapshot, job.suite, workspace)
    candidate = evaluate_candidate(folder.checkpoint, job.suite, folder.evaluation, baseline, recipe.name)
    decision = gate(baseline, candidate, job, folder.checkpoint)
    if decision.verdict != "accepted":
        return _end(stages.decided(job, snapshot, checkpoint, decision, None), folder.outcome)

    release = publish(folder.checkpoint, spec.repo_id, spec.collection)
    return _end(stages.decided(job, snapshot, checkpoint, decision, release), folder.outcome)


def _end(outcome: Outcome, path: Path) -> State[Outcome]:
    outcome.save(path)
    return Completed(name=STATE_NAMES[outcome.verdict], message=outcome.reason, data=outcome)
