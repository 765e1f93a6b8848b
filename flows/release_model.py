"""One model, one recipe: from a name on the Hub to a published FP8 release, or the reason why there is none."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

import tasks
from fp8pipe import stages
from fp8pipe.config import ReleaseSpec, ResolvedRelease
from fp8pipe.machine import device, engine_python
from fp8pipe.quantize import fingerprint
from fp8pipe.records import EvalReport, GateDecision, Outcome, Snapshot
from fp8pipe.release.outcome import decided, unsound
from fp8pipe.release.workspace import ReleaseFolder, Workspace
from tasks.baseline import Baseline

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
    """Quantize `spec.model`, validate it, measure it against its own baseline, gate it, publish it if accepted.

    When the numbers reject it, the recipe's next fallback is tried.
    """
    with engine_python.using(spec.engine.python):
        outcome = _release(spec.resolve())
    return Completed(name=STATE_NAMES[outcome.ending], message=outcome.reason, data=outcome)


def _release(job: ResolvedRelease) -> Outcome:
    """Attempt after attempt; the outcome of the last."""
    device.require(())
    tasks.check_target(job)
    workspace = Workspace(Path(job.spec.work_dir).resolve())
    tasks.plan_evaluation(job, workspace)
    snapshot = tasks.pin(job.spec.model)

    attempts: list[Outcome] = []
    for rung in job.ladder():
        attempts.append(_attempt(rung, snapshot, workspace, attempts))
        if not attempts[-1].falls_back:
            break
    return attempts[-1]


def _attempt(job: ResolvedRelease, snapshot: Snapshot, workspace: Workspace, earlier: list[Outcome]) -> Outcome:
    """One recipe, from plan to publication."""
    spec, recipe = job.spec, job.recipe
    plan = tasks.plan(snapshot, recipe, spec.trust_remote_code, spec.oracles)
    job = job.spread(tasks.require_machine(snapshot, plan, job.suite, job.policy))
    calibration = None
    if recipe.needs_calibration:
        snapshot = tasks.download(snapshot, spec.trust_remote_code)
        calibration = tasks.calibrate(snapshot, plan, recipe, workspace, spec.device)
    if recipe.keep_bf16 is not None:
        plan = tasks.plan(snapshot, recipe, spec.trust_remote_code, spec.oracles, calibration)
    identity = fingerprint(snapshot, recipe, calibration.digest() if calibration else None)
    folder = workspace.release(snapshot.model_id, recipe.name, identity)
    with Baseline(job, workspace) as baseline:
        checkpoint, snapshot = tasks.quantize(snapshot, plan, folder.checkpoint, calibration, spec, baseline)
        report = tasks.validate(folder.checkpoint, snapshot, recipe.name, spec.oracles, baseline)
        if not report.sound:
            return unsound(job, snapshot, plan, checkpoint, report).kept(folder.outcome)
        reports = baseline.reports(snapshot)

    decision = _decide(job, folder, reports, earlier)
    release = None
    if stages.may_publish(folder.checkpoint):
        release = tasks.publish(folder.checkpoint, spec.target)
    elif stages.is_question(decision, job.policy):
        tasks.ask(job, folder.checkpoint, decision)
    return decided(job, snapshot, plan, checkpoint, decision, release).kept(folder.outcome)


def _decide(
    job: ResolvedRelease, folder: ReleaseFolder, baseline: tuple[EvalReport, ...], earlier: list[Outcome]
) -> GateDecision:
    """Measure the candidate, and gate it look by look until the samples settle it or the looks are used up."""
    decisions: list[GateDecision] = []

    def decide(ours: EvalReport, theirs: EvalReport, look: int) -> GateDecision:
        decisions.append(tasks.gate(ours, theirs, job, folder.checkpoint, look, earlier))
        return decisions[-1]

    tasks.evaluate_candidate(folder.checkpoint, job, folder.evaluation, baseline, decide)
    return decisions[-1]
