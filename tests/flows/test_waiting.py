"""A run that waits for a device says so in its state in Prefect, and is Running again once it has the device."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.processes import importing_the_repository

from fp8pipe.machine.locks import devices, hold
from fp8pipe.progress import quiet

FLOW = """
import sys
from pathlib import Path
from prefect import flow, task
from fp8pipe.machine.locks import devices, hold
from tasks.progress import reporter

@task
def measure():
    with hold([devices("cpu")], "evaluate it", stage="evaluate", progress=reporter("evaluate baseline", "quick")):
        Path(sys.argv[1]).touch()
        sys.stdin.read()

@flow
def measuring():
    measure()

measuring()
"""


@pytest.mark.prefect
def test_a_run_that_waits_for_a_device_says_so_in_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client.orchestration import SyncPrefectClient

    from fp8pipe.machine.prefect_server import EmbeddedServer

    monkeypatch.setenv("FP8PIPE_LOCKS", str(tmp_path / "locks"))
    server = EmbeddedServer(tmp_path / "server.log", tmp_path / "home")
    own = importing_the_repository() | {"PREFECT_API_URL": server.api_url, "PREFECT_HOME": str(tmp_path / "home")}
    try:
        server.ready()
        with hold([devices("cpu")], "evaluate acme/other", stage="evaluate", progress=quiet):
            with (tmp_path / "run.log").open("w") as log:
                command = [sys.executable, "-c", FLOW, str(tmp_path / "locked")]
                run = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=importing_the_repository() | own
                )
            with SyncPrefectClient(server.api_url) as api:
                waiting = state_once(api, "AwaitingDevice")
        assert f"pid {os.getpid()} (evaluate acme/other) since" in waiting.message
        assert waiting.is_running()
        with SyncPrefectClient(server.api_url) as api:
            state_once(api, "Running")
            assert (tmp_path / "locked").exists()
            run.communicate()
            state_once(api, "Completed")
    finally:
        server.stop()
    assert run.returncode == 0, (tmp_path / "run.log").read_text()


def state_once(api: Any, name: str) -> Any:  # Any: Prefect's client and state
    deadline = time.monotonic() + 120
    while True:
        states = [run.state for run in api.read_flow_runs()]
        if found := [state for state in states if state is not None and state.name == name]:
            return found[0]
        assert time.monotonic() < deadline, f"never {name}: {states}"
        time.sleep(0.1)
