"""Pinning, planning and downloading. Network errors are retried; a wrong name is not."""

from __future__ import annotations

from prefect import task
from prefect.logging import get_run_logger

from fp8pipe import stages
from fp8pipe.config import EvalSuite, GatePolicy, Parallel, Recipe
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Snapshot
from fp8pipe.records.calibration import Calibration
from fp8pipe.ui import sheets
from tasks.progress import artifact_key, keep_page, reporter
from tasks.retries import STAGE


@task(
    name="pin",
    task_run_name="pin {model}",
    **STAGE,
)
def pin(model: str) -> Snapshot:
    """Resolve the model to one commit."""
    reporter("source", model)
    return stages.pin(model)


@task(
    name="plan",
    task_run_name="plan {snapshot.model_id} {recipe.name}",
    **STAGE,
)
def plan(
    snapshot: Snapshot,
    recipe: Recipe,
    trust_remote_code: bool,
    oracles: bool,
    calibration: Calibration | None = None,
) -> Plan:
    """Decide for every tensor from headers alone, and show it; called again when calibration decides what is kept."""
    reporter("plan", recipe.name)
    made = stages.plan(snapshot, recipe, calibration=calibration, trust_remote_code=trust_remote_code, oracles=oracles)
    key = artifact_key("plan", snapshot.model_id, recipe.name)
    table = sheets.markdown(sheets.plan_sheet(made))
    if made.serving is not None:
        table += "\n" + sheets.markdown(sheets.serving_sheet(made.serving))
    keep_page(table, key=key, description=f"Plan: {snapshot.model_id}, {recipe.name}")
    return made


@task(
    name="require-machine",
    task_run_name="require-machine {plan.model_id} {plan.recipe}",
    **STAGE,
)
def require_machine(snapshot: Snapshot, plan: Plan, suite: EvalSuite, policy: GatePolicy) -> Parallel:
    """Refuse before any work what this machine cannot evaluate or no verdict here could release; log warnings.

    Returns how both sides are to be spread over its GPUs.
    """
    parallel, warnings = stages.require_machine(snapshot, plan, suite, policy)
    for warning in warnings:
        get_run_logger().warning("%s", warning)
    return parallel


@task(
    name="download",
    task_run_name="download {snapshot.model_id}",
    **STAGE,
)
def download(snapshot: Snapshot, trust_remote_code: bool) -> Snapshot:
    """Bring the snapshot's files to this machine; files that are already here are not fetched again."""
    progress = reporter("download", snapshot.model_id)
    return stages.download(snapshot, trust_remote_code=trust_remote_code, progress=progress)
