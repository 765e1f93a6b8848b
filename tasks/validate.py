"""Validating, with the findings in an artifact."""

from __future__ import annotations

from pathlib import Path

from prefect import task

from fp8pipe import stages
from fp8pipe.records import Snapshot, ValidationReport
from fp8pipe.ui import sheets
from tasks.progress import artifact_key, keep_page, reporter
from tasks.retries import STAGE


@task(name="validate", task_run_name="validate {source.model_id}", **STAGE)
def validate(folder: Path, source: Snapshot, recipe: str, oracles: bool) -> ValidationReport:
    """Structure, values, fidelity to the source, and vLLM's own loader. Findings are data; the flow decides."""
    report = stages.validate(folder, source=source, oracles=oracles, progress=reporter("validate", source.model_id))
    key = artifact_key("findings", source.model_id, recipe)
    table = sheets.markdown(sheets.findings_sheet(report))
    if report.serving is not None:
        table += "\n" + sheets.markdown(sheets.serving_sheet(report.serving))
    keep_page(table, key=key, description=f"Findings: {source.model_id}, {recipe}")
    return report
