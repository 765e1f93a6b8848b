"""Evaluations in vLLM: one engine at a time on a device, in a child process that ends with the task."""

from __future__ import annotations

from pathlib import Path

from prefect import task

from fp8pipe import stages
from fp8pipe.config import ResolvedRelease
from fp8pipe.records import EvalReport, Snapshot
from fp8pipe.release.workspace import Workspace
from fp8pipe.ui import sheets
from tasks.progress import artifact_key, keep_page, reporter
from tasks.retries import STAGE


@task(name="evaluate baseline", task_run_name="evaluate {snapshot.model_id}", **STAGE)
def evaluate_baseline(snapshot: Snapshot, job: ResolvedRelease, workspace: Workspace, look: int) -> EvalReport:
    """The BF16 source, measured up to this look; one measurement serves all recipes."""
    return stages.evaluate_baseline(
        snapshot,
        job.suite,
        workspace,
        looks=job.policy.looks,
        look=look,
        trust_remote_code=job.spec.trust_remote_code,
        progress=reporter("evaluate baseline", job.suite.name),
    )


@task(name="evaluate candidate", task_run_name="evaluate {job.recipe.name}", **STAGE)
def evaluate_candidate(
    checkpoint_folder: Path, job: ResolvedRelease, folder: Path, baseline: EvalReport, look: int
) -> EvalReport:
    """The checkpoint, measured up to this look and served as its recipe intends; leaves a table of both sides."""
    progress, recipe = reporter("evaluate candidate", job.suite.name), job.recipe.name
    report = stages.evaluate_candidate(
        checkpoint_folder, job.suite, folder, baseline=baseline, looks=job.policy.looks, look=look, progress=progress
    )
    key = artifact_key("evaluation", report.model_id, recipe)
    table = sheets.markdown(sheets.evaluation_sheet(baseline, report))
    keep_page(table, key=key, description=f"Evaluation: {report.model_id}, {recipe}")
    return report
