"""Calibrating and quantizing. Both resume from their own records: after a crash, run the release again."""

from __future__ import annotations

from pathlib import Path

from prefect import task

from fp8pipe import stages
from fp8pipe.config import Recipe, ReleaseSpec
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Checkpoint, Snapshot
from fp8pipe.records.calibration import Calibration
from fp8pipe.release.workspace import Workspace
from tasks.baseline import Baseline
from tasks.progress import reporter
from tasks.retries import STAGE


@task(
    name="calibrate",
    task_run_name="calibrate {snapshot.model_id} {recipe.name}",
    **STAGE,
)
def calibrate(snapshot: Snapshot, plan: Plan, recipe: Recipe, workspace: Workspace, device: str) -> Calibration:
    """Ranges of activations and KV cache from the recipe's dataset."""
    progress = reporter("calibrate", recipe.calibration.dataset)
    return stages.calibrate(snapshot, plan, recipe, workspace, device=device, progress=progress)


@task(
    name="quantize",
    task_run_name="quantize {snapshot.model_id} {plan.recipe}",
    **STAGE,
)
def quantize(
    snapshot: Snapshot,
    plan: Plan,
    folder: Path,
    calibration: Calibration | None,
    spec: ReleaseSpec,
    baseline: Baseline,
) -> tuple[Checkpoint, Snapshot]:
    """The FP8 checkpoint, and the snapshot on this machine. Files still on the Hub are quantized as they arrive; once
    all are here, the baseline may start."""
    progress = reporter("quantize", plan.recipe, stop=baseline.stop)
    return stages.quantize(
        snapshot,
        plan,
        folder,
        calibration=calibration,
        claim=spec.licence,
        licences=spec.licences,
        arrived=baseline.start,
        card_template=spec.card_template,
        progress=progress,
    )
