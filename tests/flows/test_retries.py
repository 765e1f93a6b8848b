"""What a flow tries again."""

from __future__ import annotations

import pytest
from prefect.states import Failed

import tasks
from fp8pipe.errors import ConfigError, Fp8PipeError, HubUnreachable
from tasks.retries import is_transient


@pytest.mark.parametrize("name", tasks.__all__)
def test_every_task_asks_the_error_whether_to_try_again(name: str) -> None:
    task = getattr(tasks, name)
    assert task.retries > 0
    assert task.retry_condition_fn is is_transient


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (HubUnreachable("the Hub does not answer"), True),
        (ConfigError("no such recipe"), False),
        (Fp8PipeError("refused"), False),
        (ValueError("a bug"), False),
    ],
)
def test_only_what_may_pass_by_itself_is_tried_again(error: Exception, again: bool) -> None:
    task = tasks.pin
    assert is_transient(task, None, Failed(data=error)) is again  # type: ignore[arg-type]
