"""The gate, with every number it compared in an artifact; the evaluation plan before it, a person's decision after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_UI_URL

from fp8pipe import stages
from fp8pipe.config import ResolvedRelease
from fp8pipe.gate.evaluation_plan import EvalPlan
from fp8pipe.records import Approval, EvalReport, GateDecision, Outcome, record_path
from fp8pipe.release.card.markdown import escape
from fp8pipe.release.outcome import earlier_attempts
from fp8pipe.release.workspace import Workspace
from fp8pipe.ui import sheets
from tasks.progress import artifact_key, keep_page, reporter
from tasks.retries import STAGE

APPROVAL_DEPLOYMENT = "approve-release/approve-release"
"""Flow and deployment that ask a person. It needs no GPU."""


@task(
    name="plan evaluation",
    task_run_name="plan evaluation {job.suite.name} for {job.policy.name}",
    **STAGE,
)
def plan_evaluation(job: ResolvedRelease, workspace: Workspace) -> EvalPlan:
    """Fail now, not after hours of GPU time, if the suite cannot settle what the policy asks."""
    reporter("plan evaluation", job.suite.name)
    folder = workspace.suite(job.suite.digest())
    evaluation_plan = stages.plan_evaluation(job.policy, job.suite, folder, attempts=len(job.ladder()))
    key = artifact_key("plan-eval", job.policy.name, job.suite.name)
    table = sheets.markdown(sheets.eval_plan_sheet(evaluation_plan, job.policy, job.suite))
    keep_page(table, key=key, description=f"Policy {job.policy.name} on suite {job.suite.name}")
    evaluation_plan.require()
    return evaluation_plan


@task(
    name="gate",
    task_run_name="gate {job.recipe.name} by {job.policy.name}, look {look}",
    **STAGE,
)
def gate(
    baseline: EvalReport,
    candidate: EvalReport,
    job: ResolvedRelease,
    checkpoint_folder: Path,
    look: int,
    earlier: Sequence[Outcome],
) -> GateDecision:
    """The verdict at this look, after the `earlier` attempts of the ladder. A rejection is a result, not a failure."""
    reporter("gate", job.policy.name)
    decision = stages.gate(
        baseline,
        candidate,
        job.policy,
        suite=job.suite,
        checkpoint_folder=checkpoint_folder,
        attempt=job.attempt,
        attempts=job.attempts,
        look=look,
        earlier=earlier_attempts(earlier),
    )
    recipe = job.recipe.name
    key = artifact_key("gate", candidate.model_id, recipe)
    text = sheets.markdown(sheets.decision_sheet(decision)) + sheets.plots_markdown(checkpoint_folder)
    keep_page(text, key=key, description=f"Gate: {candidate.model_id}, {recipe}")
    emit_event(
        event=f"fp8pipe.gate.{decision.verdict}",
        resource={"prefect.resource.id": f"fp8pipe.release.{key}", "prefect.resource.name": candidate.model_id},
        payload={"reason": decision.reason, "fingerprint": decision.candidate_fingerprint},
    )
    return decision


@task(name="ask", task_run_name="ask a person about {job.spec.repo_id}", **STAGE)
def ask(job: ResolvedRelease, checkpoint_folder: Path, decision: GateDecision) -> None:
    """Start the flow that waits for a person's decision; without its deployment, log the commands that decide it."""
    commands = (
        f"fp8pipe approve {checkpoint_folder} --by NAME --reason WHY, then "
        f"fp8pipe publish {checkpoint_folder} --repo-id {job.spec.repo_id}"
    )
    parameters = {
        "folder": str(checkpoint_folder),
        "target": job.spec.target.model_dump(mode="json"),
    }
    try:
        # One question per decision, however often the release runs again.
        asked = cast(  # Prefect's type covers the asynchronous call too
            FlowRun,
            run_deployment(
                APPROVAL_DEPLOYMENT,
                parameters=parameters,
                timeout=0,
                as_subflow=False,
                idempotency_key=decision.digest(),
            ),
        )
    except ObjectNotFound:
        get_run_logger().warning("no deployment %s to ask a person; decide with: %s", APPROVAL_DEPLOYMENT, commands)
        return
    link = f"{PREFECT_UI_URL.value()}/runs/flow-run/{asked.id}"
    key = artifact_key("approval", job.spec.repo_id)
    create_link_artifact(link, link_text="Decide here", key=key, description=escape(f"Or with: {commands}"))


@task(name="question", **STAGE)
def question(checkpoint_folder: Path) -> str:
    """The decision that a person is asked about, as Markdown."""
    decision = GateDecision.load(record_path(checkpoint_folder, "gate"))
    return sheets.markdown(sheets.decision_sheet(decision))


@task(name="approve", task_run_name="approved by {who}", **STAGE)
def approve(checkpoint_folder: Path, who: str, reason: str) -> Approval:
    """Record who decided, when and why."""
    return stages.approve(checkpoint_folder, who=who, reason=reason)
