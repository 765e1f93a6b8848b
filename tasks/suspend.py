"""Suspends a flow run until a person answers, so that the answer may come at any moment.

Prefect's own `suspend_flow_run` sets the state Suspended while the run's process is still ending. A worker keeps its
processes by flow run: when the run is resumed in that moment, the end of the first process removes the second from the
worker's books, with its working directory, and the run is reported as Crashed (prefect 3.7, `Runner.execute_flow_run`).
Here the process ends first. A small process of its own waits for that end and then sets the state.

    python -m tasks.suspend FLOW_RUN_ID PID STATE
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from typing import TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import Pause
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.input.run_input import keyset_from_paused_state
from prefect.states import Suspended

A = TypeVar("A", bound=RunInput)

WORKER_NOTICES_S = 1.0
"""Seconds in which a worker notices that a process has ended; it looks ten times a second."""
PATIENCE_S = 600.0
"""Seconds for which the server may be unreachable."""


def answer_to(form: type[A], *, key: str, timeout_s: int) -> A:
    """What a person filled into `form`. The first call ends this process; the resumed run calls it again and gets it.

    Call it from a flow that runs as a deployment, with `persist_result=True`. key: names the question within the run.
    """
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None, "call it from a flow"
    run = context.flow_run
    if key in (run.empirical_policy.pause_keys or ()) or run.deployment_id is None:
        return suspend_flow_run(wait_for_input=form, timeout=timeout_s, key=key)  # asked before: this reads the answer
    state = Suspended(timeout_seconds=timeout_s, pause_key=key)
    keyset = keyset_from_paused_state(state)
    state.state_details.run_input_keyset = {**keyset}
    form.save(keyset, flow_run_id=run.id)
    command = [sys.executable, "-m", "tasks.suspend", str(run.id), str(os.getpid()), state.model_dump_json()]
    nothing = subprocess.DEVNULL
    subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, cwd="/", start_new_session=True)
    raise Pause(f"suspended until a person answers ({key})")


def main() -> None:
    """Wait for the run's process to end, then set the state."""
    flow_run_id, pid, state = UUID(sys.argv[1]), int(sys.argv[2]), State.model_validate_json(sys.argv[3])
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    time.sleep(WORKER_NOTICES_S)
    deadline = time.monotonic() + PATIENCE_S
    with get_client(sync_client=True) as client:
        while True:
            try:
                client.set_flow_run_state(flow_run_id, state)
                return
            except httpx.HTTPError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(2)


if __name__ == "__main__":
    main()
