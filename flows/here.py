"""Run a flow in this process, for the person at the terminal, whose display receives its progress."""

from __future__ import annotations

from typing import Any, cast

from prefect import Flow
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

from flows.release_collection import release_collection
from flows.release_model import release_model
from fp8pipe.config import CollectionSpec, ReleaseSpec
from fp8pipe.progress import Progress
from fp8pipe.records import BatchResult, Outcome
from tasks.progress import show_on


def release(spec: ReleaseSpec, display: Progress) -> Outcome:
    """Run one release; if it fails, raise the error that ended it."""
    return cast(Outcome, _run(release_model, spec, display, raise_on_failure=True))


def batch(spec: CollectionSpec, display: Progress) -> BatchResult:
    """Run every release of a collection; failures are entries of the result."""
    return cast(BatchResult, _run(release_collection, spec, display, raise_on_failure=False))


def _run(flow: Flow[..., Any], parameter: Any, display: Progress, *, raise_on_failure: bool) -> Any:
    # Any: Prefect types a flow that returns a state as returning the state, not its result
    show_on(display)
    try:
        return flow(parameter, return_state=True).result(raise_on_failure=raise_on_failure)
    finally:
        # Prefect's background senders outlive the flow: drain them while the server that they talk to still runs.
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all()
