"""Deciding, with every number it compared where a person can read it."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from fp8pipe import show, stages
from fp8pipe.config import ResolvedRelease
from fp8pipe.records import EvalReport, GateDecision
from tasks.progress import artifact_key, reporter


@task(name="gate", task_run_name="gate {job.recipe.name} by {job.policy.name}", cache_policy=NO_CACHE)
def gate(
    baseline: EvalReport,
    candidate: EvalReport,
    job: ResolvedRelease,
    checkpoint_folder: Path,
) -> GateDecision:
    """The verdict. A rejection is a result, not a failure."""
    reporter("gate", job.policy.name)
    decision = stages.decide_release(
        baseline, candidate, job.policy, suite=job.suite, checkpoint_folder=checkpoint_folder
    )
    recipe = job.recipe.name
    key = artifact_key("gate", candidate.model_id, recipe)
    text = show.markdown(show.decision_sheet(decision)) + show.plots_markdown(checkpoint_folder)
    create_markdown_artifact(text, key=key, description=f"Gate: {candidate.model_id}, {recipe}")
    emit_event(
        event=f"fp8pipe.gate.{decision.verdict}",
        resource={"prefect.resource.id": f"fp8pipe.release.{key}", "prefect.resource.name": candidate.model_id},
        payload={"reason": decision.reason, "fingerprint": decision.candidate_fingerprint},
    )
    return decision
