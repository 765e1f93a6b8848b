"""What tasks share: retries for transient errors, and one engine per machine. Records resume a run, not a cache."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

from prefect import Task
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.tasks import exponential_backoff

from fp8pipe.errors import Fp8PipeError


def is_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether to retry: the error knows whether it may pass by itself."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, Fp8PipeError) and error.transient


class _Options(TypedDict):
    cache_policy: CachePolicy
    retries: int
    retry_delay_seconds: Callable[[int], list[float]]
    retry_condition_fn: Callable[[Task[..., Any], TaskRun, State[Any]], bool]


STAGE: _Options = {
    "cache_policy": NO_CACHE,
    "retries": 4,
    "retry_delay_seconds": exponential_backoff(backoff_factor=5),
    "retry_condition_fn": is_transient,
}
"""Options of every task: its stage's record resumes it, not a result cache, and what may pass by itself is retried."""


@contextmanager
def engine_slot() -> Iterator[None]:
    """Hold this machine's one engine slot: two vLLM engines would compete for the device's memory.

    It is the global concurrency limit `engine:<host>`, created when absent and acquired with `strict`: otherwise
    Prefect skips a missing limit silently and the body would run unprotected.
    """
    name = f"engine:{socket.gethostname()}"
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    with concurrency(name, occupy=1, strict=True):
        yield
