"""What every task has in common: its stage's record resumes it, and what may pass by itself is tried again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from prefect import Task
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.client.schemas.objects import State, TaskRun
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
