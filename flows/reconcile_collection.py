"""A Hub collection lists what its file says: first the differences, and on request the changes."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

import tasks
from fp8pipe.config import CollectionSpec, load_collection
from fp8pipe.records import Reconciliation


@flow(name="reconcile-collection", flow_run_name="reconcile collection")
def reconcile_collection(collection: CollectionSpec | str, apply: bool = False) -> State[Reconciliation]:
    """Compare the Hub collection with `collection` (a specification, or the name or path of its file); with `apply`,
    make it list what the file says."""
    spec = load_collection(collection) if isinstance(collection, str) else collection
    found = tasks.reconcile(spec, apply=apply)
    name = "Unchanged" if not found.changes else "Reconciled" if found.applied else "Differs"
    said = f"{len(found.changes)} changes, {len(found.missing)} releases not on the Hub"
    return Completed(name=name, message=said, data=found)
