"""The baseline beside the making of a checkpoint: both sides run at once, and whatever ends one ends the other.

An engine that scores nothing takes the place of vLLM, and a wait for its measurement that of quantizing.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.evaluation import looker, processes_of
from support.processes import all_gone, importing_the_repository

from fp8pipe.machine.locks import devices, folder_lock, hold
from fp8pipe.machine.prefect_server import EmbeddedServer

pytestmark = pytest.mark.prefect

FLOW = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from prefect import flow, task
from fp8pipe import stages
from fp8pipe.config import EvalSuite, TaskSpec
from fp8pipe.evaluate import evaluate, request_for
from fp8pipe.progress import ProgressEvent
from tasks.baseline import Baseline
from tasks.progress import reporter, show_on

sys.executable, root, then = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
stages.engine_leaves_the_cpu = lambda: True

def measure(snapshot, suite, workspace, *, looks, trust_remote_code, progress):
    suite = EvalSuite(name="tiny", tasks={"t": TaskSpec()})
    request = request_for(root / "model", suite, role="baseline", model_id="m", fingerprint="f")
    return (evaluate(request, root / "baseline", progress=progress),)

stages.evaluate_baseline = measure

@task
def quantize(baseline):
    progress = reporter("quantize", "r", stop=baseline.stop)
    baseline.start(SimpleNamespace(model_id="m"))
    while not (root / "baseline" / "scored").exists():
        progress(ProgressEvent("quantize", 0, None))
        time.sleep(0.05)
    print("both run", flush=True)
    if then == "error":
        raise ArithmeticError("no checkpoint")
    while then in ("wait", "engine fails"):
        progress(ProgressEvent("quantize", 0, None))
        time.sleep(0.05)

@flow
def releasing():
    suite, policy = SimpleNamespace(name="tiny"), SimpleNamespace(looks=(1.0,))
    job = SimpleNamespace(suite=suite, policy=policy, spec=SimpleNamespace(trust_remote_code=False))
    with Baseline(job, None) as baseline:
        quantize(baseline)
        if then == "unsound":
            return
        (report,) = baseline.reports(None)
        print("measured", report.table, flush=True)

if __name__ == "__main__":
    show_on(lambda event: print(event.stage, event.beside, event.ended, file=sys.stderr))
    releasing()
"""


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a process that uses a server of these tests' own."""
    folder = tmp_path_factory.mktemp("prefect")
    server = EmbeddedServer(folder / "log", folder / "home")
    try:
        server.ready()
        yield importing_the_repository() | {"PREFECT_API_URL": server.api_url, "PREFECT_HOME": str(folder / "home")}
    finally:
        server.stop()


@contextmanager
def releasing(environment: dict[str, str], model: Path, then: str, engine: str) -> Iterator[subprocess.Popen[str]]:
    """The flow, once both sides run."""
    root = model.parent
    script = root / "flow.py"
    script.write_text(FLOW)
    command = [sys.executable, str(script), looker(root, engine), str(root), then]
    pipe = subprocess.PIPE
    with (
        (root / "log").open("w") as log,
        subprocess.Popen(command, stdout=pipe, stderr=log, text=True, env=environment) as run,
    ):
        assert run.stdout is not None
        assert run.stdout.readline() == "both run\n", (root / "log").read_text()
        yield run


SLEEPS = "import time; time.sleep(600)"


def test_the_baseline_is_measured_while_the_checkpoint_is_made(
    prefect: dict[str, str], model: Path, tmp_path: Path
) -> None:
    with releasing(prefect, model, "go on", "import time; time.sleep(1)") as run:
        assert run.communicate()[0] == "measured look 1\n", (tmp_path / "log").read_text()
    assert run.returncode == 0
    told = (tmp_path / "log").read_text()
    assert "evaluate baseline True False" in told
    assert "evaluate baseline True True" in told


@pytest.mark.parametrize(
    ("then", "number", "ending"),
    [
        ("error", None, "ArithmeticError: no checkpoint"),
        ("unsound", None, ""),
        ("wait", signal.SIGINT, "KeyboardInterrupt"),
        ("wait", signal.SIGTERM, ""),
        ("wait", signal.SIGKILL, ""),
    ],
)
def test_the_end_of_the_checkpoint_ends_the_baseline(
    prefect: dict[str, str], model: Path, tmp_path: Path, then: str, number: signal.Signals | None, ending: str
) -> None:
    with releasing(prefect, model, then, SLEEPS) as run:
        members = processes_of(tmp_path / "baseline")
        if number is not None:
            run.send_signal(number)
        run.communicate()
    assert ending in (tmp_path / "log").read_text()
    assert then == "unsound" or run.returncode != 0
    assert all_gone(members)
    assert not processes_of(tmp_path / "baseline")
    waits = []
    with hold((folder_lock(tmp_path / "baseline"), devices("cpu")), "", stage="", progress=waits.append):
        assert waits == []
    assert not (tmp_path / "baseline" / "report.json").exists()


def test_a_failing_engine_ends_the_making_of_the_checkpoint(
    prefect: dict[str, str], model: Path, tmp_path: Path
) -> None:
    with releasing(prefect, model, "engine fails", "raise RuntimeError('CUDA error')") as run:
        run.communicate()
    told = (tmp_path / "log").read_text()
    assert run.returncode == 1
    assert "EngineFailed" in told
    assert "quantize: ended, because another stage of this release was" in told
    assert all_gone(processes_of(tmp_path / "baseline"))
