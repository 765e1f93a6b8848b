"""A collection file beside the Hub. Every step checks before it acts: retries converge."""

from __future__ import annotations

from prefect import task

from fp8pipe.config import CollectionSpec
from fp8pipe.records import Reconciliation, ReleaseStatus
from fp8pipe.release.reconcile import reconcile as compare
from fp8pipe.release.status import collection_status as examine
from fp8pipe.ui import sheets
from tasks.progress import artifact_key, keep_page, reporter
from tasks.retries import STAGE


@task(name="reconcile", task_run_name="reconcile {spec.collection.title}", **STAGE)
def reconcile(spec: CollectionSpec, *, apply: bool) -> Reconciliation:
    """What the Hub collection lists otherwise than the file says; with `apply`, changed. With a page that says so."""
    title = spec.collection.title
    reporter("reconcile", title)
    found = compare(spec, apply=apply)
    key = artifact_key("reconcile", spec.collection.namespace, title)
    keep_page(
        sheets.markdown(sheets.reconciliation_sheet(found, "FILE")), key=key, description=f"Reconciliation: {title}"
    )
    return found


@task(name="collection-status", task_run_name="status of {spec.collection.title}", **STAGE)
def collection_status(spec: CollectionSpec) -> tuple[ReleaseStatus, ...]:
    """The state of each release of the file, by the Hub; with a page that says so."""
    title = spec.collection.title
    reporter("status", title)
    rows = examine(spec)
    key = artifact_key("status", spec.collection.namespace, title)
    keep_page(sheets.markdown(sheets.status_sheet(rows)), key=key, description=f"Status: {title}")
    return rows
