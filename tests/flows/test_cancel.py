"""A flow run is cancelled in Prefect while vLLM measures: everything that the evaluation had started ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import TESTS
from support.evaluation import make_tasks, make_tiny_llama, processes_of
from support.processes import running

FLOW = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support.evaluation import make_suite
from prefect import flow, task
from fp8pipe.evaluate import evaluate, request_for

@task
def measure(folder: str):
    root = Path(folder)
    suite = make_suite(root / "tasks")
    request = request_for(root / "model", suite, role="baseline", model_id="m", fingerprint="f")
    evaluate(request, root / "out")

@flow
def measuring(folder: str):
    measure(folder)

if __name__ == "__main__":
    measuring.serve(name="measuring", pause_on_shutdown=False)
"""


def until(reached: Callable[[], bool], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.mark.prefect
@pytest.mark.vllm
def test_cancelled_flow_run_leaves_no_process_of_its_evaluation(tmp_path: Path) -> None:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.states import Cancelling

    from fp8pipe.machine.prefect_server import EmbeddedServer

    make_tiny_llama(tmp_path / "model")
    make_tasks(tmp_path / "tasks")
    script = tmp_path / "measuring.py"
    script.write_text(FLOW.format(tests=str(TESTS)))
    server = EmbeddedServer(tmp_path / "server.log", tmp_path / "home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_API_URL": server.api_url, "PREFECT_HOME": str(tmp_path / "home")}
    environment |= {"PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        server.ready()
        log = stack.enter_context((tmp_path / "runner.log").open("w"))
        runner = subprocess.Popen(
            [sys.executable, str(script)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        stack.callback(runner.wait)
        stack.callback(os.killpg, runner.pid, signal.SIGKILL)
        with SyncPrefectClient(server.api_url) as api:
            run_id = asyncio.run(started(server.api_url, str(tmp_path)))
            until(lambda: worker_is_loading(tmp_path), f"no engine: {(tmp_path / 'runner.log').read_text()[-3000:]}")
            members = processes_of(tmp_path / "out")
            assert len(members) >= 2, "the guard and the worker"
            api.set_flow_run_state(run_id, Cancelling())
            until(lambda: not any(map(running, members)), f"one of these is still there: {members}", 120)
            assert not processes_of(tmp_path / "out")
            until(lambda: (state := api.read_flow_run(run_id).state) is not None and state.is_cancelled(), "state")


def worker_is_loading(folder: Path) -> bool:
    """vLLM has begun to start: it has memory, threads, perhaps processes."""
    log = folder / "out" / "worker.log"
    return log.exists() and "vllm" in log.read_text(errors="replace").lower()


async def started(api_url: str, folder: str) -> object:
    """The id of a new run of the deployment, which the runner may still be about to register."""
    from prefect.client.orchestration import PrefectClient
    from prefect.exceptions import ObjectNotFound

    async with PrefectClient(api_url) as api:
        deadline = time.monotonic() + 120
        while True:
            try:
                deployment = await api.read_deployment_by_name("measuring/measuring")
                break
            except ObjectNotFound:
                assert time.monotonic() < deadline, "the deployment was never registered"
                await asyncio.sleep(0.5)
        return (await api.create_flow_run_from_deployment(deployment.id, parameters={"folder": folder})).id
