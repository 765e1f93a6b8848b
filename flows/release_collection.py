"""A list of models with every recipe: one release after the other. A failure does not stop the rest."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

import tasks
from flows.release_model import release_model
from fp8pipe.config import CollectionSpec, ReleaseSpec, load_collection
from fp8pipe.errors import from_system
from fp8pipe.machine import engine_python
from fp8pipe.records import BatchEntry, BatchResult, Outcome
from fp8pipe.release.workspace import Workspace
from fp8pipe.ui import sheets
from tasks.progress import artifact_key


@flow(name="release-collection", flow_run_name="release collection")
def release_collection(collection: CollectionSpec | str) -> State[BatchResult]:
    """Release every model of a collection (a specification, or the name or path of its file)."""
    spec = load_collection(collection) if isinstance(collection, str) else collection
    releases = spec.releases()
    refusals = [_refusal(one) for one in releases]  # of all, before the first of them needs a GPU
    for one, refusal in zip(releases, refusals, strict=True):
        if refusal is None:
            with engine_python.using(one.engine.python):
                tasks.plan_evaluation(one.resolve(), Workspace(Path(one.work_dir).resolve()))
    entries = (
        _release(one) if refusal is None else _failed(one, refusal)
        for one, refusal in zip(releases, refusals, strict=True)
    )
    result = BatchResult(collection=spec.collection.title, entries=tuple(entries))
    key = artifact_key("collection", spec.collection.namespace, spec.collection.title)
    create_markdown_artifact(
        sheets.markdown(sheets.batch_sheet(result)), key=key, description=f"Collection: {spec.collection.title}"
    )
    broken = [entry for entry in result.entries if entry.error]
    if broken:
        return Failed(message=f"{len(broken)} of {len(releases)} releases failed: {broken[0].error}", data=result)
    return Completed(message=f"{len(releases)} releases decided", data=result)


def _refusal(spec: ReleaseSpec) -> BaseException | None:
    """Why the Hub would not take this release; None if it would."""
    ended = tasks.check_target(spec.resolve(), return_state=True).result(raise_on_failure=False)
    return ended if isinstance(ended, BaseException) else None


def _release(spec: ReleaseSpec) -> BatchEntry:
    ended = release_model(spec, return_state=True).result(raise_on_failure=False)
    if not isinstance(ended, Outcome):
        return _failed(spec, ended)
    return BatchEntry(
        model=spec.model, recipe=spec.recipe, repo_id=spec.repo_id, exit_code=ended.exit_code, outcome=ended, error=None
    )


def _failed(spec: ReleaseSpec, error: object) -> BatchEntry:
    found = from_system(error) if isinstance(error, BaseException) else None
    code = found.exit_code if found is not None else 5
    said = f"{type(error).__name__}: {error}"
    return BatchEntry(
        model=spec.model, recipe=spec.recipe, repo_id=spec.repo_id, exit_code=code, outcome=None, error=said
    )
