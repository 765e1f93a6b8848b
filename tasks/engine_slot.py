"""One engine at a time on a machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound


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
