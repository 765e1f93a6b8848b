"""Validating, with the findings in an artifact."""

from __future__ import annotations

from pathlib import Path

from prefect import task

from fp8pipe import stages
from fp8pipe.records import Snapshot, ValidationReport
from fp8pipe.ui import sheets
from tasks.baseline import Baseline
from tasks.progress import artifact_key, keep_page, reporter
from tasks.retries import STAGE


@task(name="validate", task_run_name="validate {source.model_id}", **STAGE)
def validate(folder: Path, source: Snapshot, recipe: str, oracles: bool, baseline: Baseline) -> ValidationReport:
    """Structure, values, fidelity to the source, and vLLM's own loader. Findings are data; the flow decides."""
    progress = reporter("validate", source.model_id, stop=baseline.stop)
    report = stages.validate(folder, source=source, oracles=oracles, progress=progress)
    progress.end()  # a baseline that runs beside it may take longer
    key = artifact_key("findings", source.model_id, recipe)
    table = sheets.markdown(sheets.findings_sheet(report))
    if report.serving is not None:
        table += "\n" + sheets.markdown(sheets.serving_sheet(report.serving))
    keep_page(table, key=key, description=f"Findings: {source.model_id}, {recipe}")
    return report
