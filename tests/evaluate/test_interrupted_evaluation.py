"""A real evaluation, killed and hung: nothing of it survives, and it resumes to the report of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.evaluation import ask, evaluate_by, processes_of
from support.processes import all_gone

from fp8pipe.config import EvalSuite
from fp8pipe.errors import EngineFailed
from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.progress import ProgressEvent
from fp8pipe.records import EvalReport

pytestmark = pytest.mark.vllm


def test_killed_and_hung_evaluation_leaves_nothing_and_resumes_to_the_same_report(
    baseline: EvalReport, warm_python: str, tiny_llama: Path, full_suite: EvalSuite, tmp_path: Path
) -> None:
    """The first run's parent is killed after the first task; the second run hangs in the second; the third finishes."""
    request, folder = ask(tiny_llama, full_suite), tmp_path / "evaluation"

    kill_parent_at(folder / "parts" / "tiny_generate-0-10.json", request, folder)
    assert not (folder / "report.json").exists()

    notes = stop_at("tiny_choose", request, folder, beating_interpreter(tmp_path))
    assert not (folder / "report.json").exists()
    assert "tiny_generate (1 of 2)" not in notes
    # The signal comes a moment after the task began: on a busy machine the worker may have finished it by then.
    open_tasks = set() if list((folder / "parts").glob("tiny_choose-*.json")) else {"tiny_choose (2 of 2)"}

    events: list[ProgressEvent] = []
    report = evaluate_by(warm_python, request, folder, events.append)
    assert comparable(report) == comparable(baseline)
    assert {event.note for event in events} >= open_tasks | {"tiny_generate again, in other batches"}
    assert "tiny_generate (1 of 2)" not in {event.note for event in events}


def comparable(report: EvalReport) -> dict[str, Any]:
    """A report without its times, which differ from run to run."""
    return report.model_dump(mode="json", exclude={"seconds", "serving"})


MEASURE = """
import sys
from pathlib import Path
from fp8pipe.evaluate import evaluate
from fp8pipe.evaluate.request import EvalRequest
evaluate(EvalRequest.load(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def kill_parent_at(sign: Path, request: EvalRequest, folder: Path) -> None:
    """Run MEASURE in a process of its own and kill that as soon as `sign` exists; its engine must end with it."""
    asked = request.save(folder.with_name("asked.json"))
    with subprocess.Popen([sys.executable, "-c", MEASURE, str(asked), str(folder)]) as parent:
        deadline = time.monotonic() + 300
        while not sign.exists():
            assert parent.poll() is None and time.monotonic() < deadline, (folder / "worker.log").read_text()[-3000:]
            time.sleep(0.01)
        started = processes_of(folder)
        parent.kill()
    assert len(started) >= 2, "the guard and the worker"
    assert all_gone(started)


BEATING = """\
#!/bin/sh
if [ "$1" = -m ]; then
  {python} -IS -c 'while True: print(flush=True); __import__("time").sleep(1)' &
fi
exec {python} "$@"
"""


def beating_interpreter(folder: Path) -> str:
    """A python whose worker has a companion that writes an empty line to the log every second, however long vLLM is
    silent while it starts. So a short limit fits, and only a stop of them all is a stall."""
    python = folder / "python"
    python.write_text(BEATING.format(python=sys.executable))
    python.chmod(0o755)
    return str(python)


def stop_at(task: str, request: EvalRequest, folder: Path, python: str) -> list[str]:
    """Stop everything but the guard once this task has begun; the error must say so, and nothing may be left.

    Returns the notes of the progress until then.
    """
    started: dict[int, str] = {}
    notes: list[str] = []

    def stop(event: ProgressEvent) -> None:
        notes.append(event.note)
        if event.note.startswith(task) and not started:
            started.update(processes_of(folder))
            for pid, command in started.items():
                if "supervise.py" not in command:
                    os.kill(pid, signal.SIGSTOP)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EngineFailed) as caught:
        patch.setattr("fp8pipe.evaluate.STALL_S", 12.0)
        evaluate_by(python, request, folder, stop)
    message = str(caught.value)
    assert len(started) >= 3, f"the guard, the worker and its companion: {started}; {message}"
    assert all_gone(started)
    assert "no sign of life" in message
    log = [line.rpartition("\r")[2].strip() for line in (folder / "worker.log").read_text().rstrip().split("\n")]
    assert [line for line in log if line][-1][:400] in message, f"the end of the log: {message}"
    assert f"full log: {folder}/worker.log" in message
    return notes
