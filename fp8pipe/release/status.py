"""The state of every release: from the records of a work folder, and if wanted from what the Hub shows.

    release_status(work_dir)                 every release that was begun there
    release_status(work_dir, spec)           those of a collection file, and what is missing
    collection_status(spec)                  each release of the file, by its repository and its source

Offline, `published` is what this work folder published. Only the Hub knows what was published elsewhere, what was
yanked, and that a source has another commit since.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from fp8pipe.config import CollectionSpec, ResolvedRelease
from fp8pipe.errors import InputError
from fp8pipe.hub.client import translated
from fp8pipe.hub.published import Published, published_at
from fp8pipe.hub.source import model_id_of, resolve
from fp8pipe.records import Checkpoint, EvalReport, Outcome, ReleaseStatus, ValidationReport
from fp8pipe.records.paths import record_path
from fp8pipe.release.reconcile import wanted_releases
from fp8pipe.release.workspace import ReleaseFolder, Workspace


def release_status(work_dir: Path, spec: CollectionSpec | None = None) -> tuple[ReleaseStatus, ...]:
    """All releases of a work folder. With a collection: only its releases, and those that are missing.

    Raises OSError for what is there but is no folder; ConfigError for a file that names what does not exist."""
    with suppress(FileNotFoundError):  # nothing was released yet
        os.scandir(work_dir).close()
    rows = tuple(_local(folder) for folder in Workspace(work_dir).releases())
    if spec is None:
        return rows
    jobs = (one.resolve() for one in spec.releases())
    return tuple(row for job in jobs for row in _of(job, rows) or (_missing(job),))


def collection_status(spec: CollectionSpec) -> tuple[ReleaseStatus, ...]:
    """Each release of a collection file: published, stale, yanked, or how far the work folder is with it.

    A release is stale if its source has another commit now, and the work folder does not know how that one ended.
    Raises ConfigError for a file that names what does not exist, OSError, AccessDenied, HubUnreachable.
    """
    jobs = tuple(one.resolve() for one in spec.releases())
    rows = release_status(Path(spec.work_dir))
    with translated(f"status of collection {spec.collection.title}"):
        look, source = cache(published_at), cache(_present_commit)
        return tuple(_on_hub(job, tuple(wanted_releases(job, look)), source, _of(job, rows)) for job in jobs)


def _on_hub(
    job: ResolvedRelease,
    releases: Sequence[Published],
    source: Callable[[str], tuple[str | None, str]],
    local: Sequence[ReleaseStatus],
) -> ReleaseStatus:
    """The state of one entry, by the releases that main of its repositories shows."""
    if not releases:
        unfinished = [row for row in local if row.state != "published"]
        return unfinished[-1] if unfinished else _missing(job)
    shown = next((one for one in releases if one.yank is None), releases[0])
    status = partial(
        ReleaseStatus,
        model=shown.model_id,
        recipe=shown.recipe,
        fingerprint=shown.fingerprint,
        source_commit=shown.source_commit,
    )
    where = f"{shown.repo_id}@{shown.tag}"
    if shown.yank is not None:
        return status(state="yanked", detail=f"{shown.repo_id}: {shown.yank.sentence()}")
    commit, problem = source(job.spec.model)
    if commit is None:
        return status(state="published", detail=f"{where}; its source cannot be compared: {problem}")
    if commit == shown.source_commit:
        return status(state="published", detail=where)
    newer = [row for row in local if row.source_commit == commit and row.state != "published"]
    if newer:
        return newer[-1].model_copy(update={"detail": f"{newer[-1].detail}; {where} is of {shown.source_commit[:12]}"})
    return status(state="stale", detail=f"{where} is of {shown.source_commit[:12]}, the source now has {commit[:12]}")


def _present_commit(model: str) -> tuple[str | None, str]:
    """The commit that a release would be made of now; None and the reason if nobody can tell."""
    try:
        return resolve(model).commit, ""
    except InputError as error:
        return None, str(error)


def _of(job: ResolvedRelease, rows: Sequence[ReleaseStatus]) -> tuple[ReleaseStatus, ...]:
    """Those that are of this entry of a file, by its recipe or one of its fallbacks."""
    mine = {(model_id_of(job.spec.model), rung.recipe.name) for rung in job.ladder()}
    return tuple(row for row in rows if (row.model, row.recipe) in mine)


def _missing(job: ResolvedRelease) -> ReleaseStatus:
    model = model_id_of(job.spec.model)
    return ReleaseStatus(
        model=model, recipe=job.recipe.name, state="missing", fingerprint="", source_commit="", detail=""
    )


def _local(folder: ReleaseFolder) -> ReleaseStatus:
    """How far a release folder is, by its records."""
    outcome = Outcome.load_if_present(folder.outcome)
    if outcome is not None:
        published = outcome.release
        return ReleaseStatus(
            model=outcome.model_id,
            recipe=outcome.recipe,
            state="published" if published else outcome.verdict,
            fingerprint=outcome.fingerprint,
            source_commit=outcome.source_commit,
            detail=f"{published.repo_id}@{published.tag}" if published else outcome.reason,
        )
    model, recipe, fingerprint = [*folder.path.name.rsplit("--", 2), "", ""][:3]
    checkpoint = Checkpoint.load_if_present(record_path(folder.checkpoint, "checkpoint"))
    return ReleaseStatus(
        model=checkpoint.model_id if checkpoint else model.replace("--", "/"),
        recipe=recipe,
        state=_progress_of(folder, checkpoint),
        fingerprint=fingerprint,
        source_commit=checkpoint.source_commit if checkpoint else "",
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
