"""The state of every release in a work folder, read from its records."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from fp8pipe.config import CollectionSpec, load_recipe
from fp8pipe.records import Checkpoint, EvalReport, Outcome, Record, ValidationReport
from fp8pipe.records.paths import record_path
from fp8pipe.release.workspace import ReleaseFolder, Workspace


class ReleaseStatus(Record):
    """The state of one model with one recipe."""

    model: str
    recipe: str
    state: str
    """How it ended, or how far it is: released | accepted | rejected | inconclusive | unsound | evaluated | validated |
    quantized | quantizing | not started"""
    fingerprint: str
    detail: str


def release_status(work_dir: Path, spec: CollectionSpec | None) -> tuple[ReleaseStatus, ...]:
    """All releases of a work folder. With a collection: only its releases, and those that have not started.

    Raises OSError for what is there but is no folder."""
    with suppress(FileNotFoundError):  # nothing was released yet
        os.scandir(work_dir).close()
    rows = tuple(_status(folder) for folder in Workspace(work_dir).releases())
    if spec is None:
        return rows
    wanted = [(one.model.partition("@")[0], load_recipe(one.recipe).name) for one in spec.releases()]
    mine = tuple(row for row in rows if (row.model, row.recipe) in wanted)
    begun = {(row.model, row.recipe) for row in mine}
    rest = (
        ReleaseStatus(model=model, recipe=recipe, state="not started", fingerprint="", detail="")
        for model, recipe in wanted
        if (model, recipe) not in begun
    )
    return (*mine, *rest)


def _status(folder: ReleaseFolder) -> ReleaseStatus:
    outcome = Outcome.load_if_present(folder.outcome)
    if outcome is not None:
        where = f"{outcome.release.repo_id}@{outcome.release.tag}" if outcome.release else outcome.reason
        return ReleaseStatus(
            model=outcome.model_id,
            recipe=outcome.recipe,
            state=outcome.ending,
            fingerprint=outcome.fingerprint,
            detail=where,
        )
    model, recipe, fingerprint = [*folder.path.name.rsplit("--", 2), "", ""][:3]
    checkpoint = Checkpoint.load_if_present(record_path(folder.checkpoint, "checkpoint"))
    return ReleaseStatus(
        model=checkpoint.model_id if checkpoint else model.replace("--", "/"),
        recipe=recipe,
        state=_progress_of(folder, checkpoint),
        fingerprint=fingerprint,
        detail=f"in progress in {folder.path}",
    )


def _progress_of(folder: ReleaseFolder, checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "quantizing"
    if EvalReport.load_if_present(folder.evaluation / "report.json") is not None:
        return "evaluated"
    if ValidationReport.load_if_present(record_path(folder.checkpoint, "validation")) is not None:
        return "validated"
    return "quantized"
