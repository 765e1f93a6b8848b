"""Calibrating and quantizing. Both resume from their own records: after a crash, run the release again."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from fp8pipe import stages
from fp8pipe.config import Recipe
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Checkpoint, Snapshot
from fp8pipe.records.calibration import Calibration
from fp8pipe.release.workspace import Workspace
from tasks.policy import HUB_RETRIES, HUB_RETRY_DELAYS, is_transient
from tasks.progress import reporter


@task(
    name="calibrate",
    task_run_name="calibrate {snapshot.model_id} {recipe.name}",
    cache_policy=NO_CACHE,
    retries=HUB_RETRIES,
    retry_delay_seconds=HUB_RETRY_DELAYS,
    retry_condition_fn=is_transient,
)
def calibrate(snapshot: Snapshot, plan: Plan, recipe: Recipe, workspace: Workspace, device: str) -> Calibration:
    """Ranges of activations and KV cache from the recipe's dataset."""
    progress = reporter("calibrate", recipe.calibration.dataset)
    return stages.calibrate(snapshot, plan, recipe, workspace, device=device, progress=progress)


@task(
    name="quantize",
    task_run_name="quantize {snapshot.model_id} {plan.recipe}",
    cache_policy=NO_CACHE,
    retries=HUB_RETRIES,
    retry_delay_seconds=HUB_RETRY_DELAYS,
    retry_condition_fn=is_transient,
)
def quantize(
    snapshot: Snapshot, plan: Plan, folder: Path, calibration: Calibration | None
) -> tuple[Checkpoint, Snapshot]:
    """The FP8 checkpoint, and the snapshot on this machine. Files still on the Hub are quantized as they arrive."""
    progress = reporter("quantize", plan.recipe)
    return stages.quantize(snapshot, plan, folder, calibration=calibration, progress=progress)
