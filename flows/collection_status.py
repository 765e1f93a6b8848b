"""Where every release of a collection file is: published, stale, yanked, rejected, missing."""

from __future__ import annotations

from collections import Counter

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

import tasks
from fp8pipe.config import CollectionSpec, load_collection
from fp8pipe.records import ReleaseStatus


@flow(name="collection-status", flow_run_name="collection status")
def collection_status(collection: CollectionSpec | str) -> State[tuple[ReleaseStatus, ...]]:
    """Ask the Hub about each release of `collection` (a specification, or the name or path of its file)."""
    rows = tasks.collection_status(load_collection(collection) if isinstance(collection, str) else collection)
    counts = Counter(row.state for row in rows)
    return Completed(message=", ".join(f"{count} {state}" for state, count in counts.items()), data=rows)
