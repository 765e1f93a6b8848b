"""Evaluations in vLLM: one engine at a time on a device, in a child process that ends with the task."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from prefect import task

from fp8pipe import stages
from fp8pipe.config import ResolvedRelease
from fp8pipe.records import EvalReport, GateDecision, Snapshot
from fp8pipe.release.workspace import Workspace
from fp8pipe.ui import sheets
from tasks.progress import artifact_key, keep_page, reporter
from tasks.retries import STAGE


@task(name="evaluate baseline", task_run_name="evaluate {snapshot.model_id}", **STAGE)
def evaluate_baseline(
    snapshot: Snapshot, job: ResolvedRelease, workspace: Workspace, beside: threading.Event | None
) -> tuple[EvalReport, ...]:
    """The BF16 source, one report for each look; one measurement serves all recipes.

    beside: where it runs beside other stages, ends it when it is set.
    """
    progress = reporter("evaluate baseline", job.suite.name, stop=beside, beside=beside is not None)
    reports = stages.evaluate_baseline(
        snapshot,
        job.suite,
        workspace,
        looks=job.policy.looks,
        trust_remote_code=job.spec.trust_remote_code,
        progress=progress,
    )
    progress.end()
    return reports


@task(name="evaluate candidate", task_run_name="evaluate {job.recipe.name}", **STAGE)
def evaluate_candidate(
    checkpoint_folder: Path,
    job: ResolvedRelease,
    folder: Path,
    baseline: tuple[EvalReport, ...],
    decide: Callable[[EvalReport, EvalReport, int], GateDecision],
) -> EvalReport:
    """The checkpoint, served as its recipe intends and measured up to the look whose decision is final; one engine
    waits for the decisions between the looks. Leaves a table of both sides.

    decide: the decision on baseline and candidate at a look.
    """
    progress, recipe = reporter("evaluate candidate", job.suite.name), job.recipe.name

    def settles(report: EvalReport, look: int) -> bool:
        ours = baseline[look - 1]
        key = artifact_key("evaluation", report.model_id, recipe)
        table = sheets.markdown(sheets.evaluation_sheet(ours, report))
        keep_page(table, key=key, description=f"Evaluation: {report.model_id}, {recipe}")
        return decide(ours, report, look).final

    return stages.evaluate_candidate(
        checkpoint_folder,
        job.suite,
        folder,
        baseline=baseline[-1],
        looks=job.policy.looks,
        settles=settles,
        progress=progress,
    )
