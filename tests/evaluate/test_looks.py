"""The looks of a sequential test: one engine measures them all, and after each one waits for the verdict."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.evaluation import ask, evaluate_by, looker, make_suite, processes_of
from support.processes import all_gone, importing_the_repository

from fp8pipe.config import TaskSpec
from fp8pipe.errors import SourceChanged
from fp8pipe.evaluate import Settles
from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.machine.locks import devices, hold
from fp8pipe.records import EvalReport

LOOKS = (0.25, 0.5, 1.0)


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8PIPE_LOCKS", str(tmp_path / "locks"))


class Judge:
    """Settles the matter at a look, and keeps what it was shown."""

    def __init__(self, at: int = 9, then: Callable[[], None] = lambda: None) -> None:
        self.at, self.then = at, then
        self.seen: list[str] = []

    def __call__(self, report: EvalReport, look: int) -> bool:
        assert report.table == f"look {look}"
        self.seen.append(report.table)
        if look == self.at:
            self.then()
        return look == self.at


def test_one_engine_measures_all_looks_and_each_is_judged_once(model: Path, tmp_path: Path) -> None:
    folder, judge = tmp_path / "evaluation", Judge()
    report = evaluate_by(looker(tmp_path), ask(model, looks=LOOKS), folder, settles=judge)
    assert judge.seen == ["look 1", "look 2", "look 3"]
    assert report.table == "look 3"
    assert (folder / "started").read_text() == "x"
    later = Judge()
    assert evaluate_by(looker(tmp_path), ask(model, looks=LOOKS), folder, settles=later) == report
    assert later.seen == judge.seen
    assert (folder / "started").read_text() == "x"


def test_a_look_that_settles_the_matter_ends_the_engine_and_frees_the_device(model: Path, tmp_path: Path) -> None:
    folder, judge = tmp_path / "evaluation", Judge(at=2)
    report = evaluate_by(looker(tmp_path), ask(model, looks=LOOKS), folder, settles=judge)
    waits = []
    with hold((devices("cpu"),), "another run", stage="", progress=waits.append):
        assert waits == []
    assert not processes_of(folder)
    assert (folder / "scored").read_text() == "12"
    assert EvalReport.load(folder / "report.json") == report
    assert EvalRequest.load(folder / "request.json").looks == LOOKS[:2]
    whole = evaluate_by(looker(tmp_path), ask(model, looks=LOOKS), folder)
    assert whole.table == "look 3"
    assert (folder / "scored").read_text() == "123"


def test_a_run_that_ends_while_the_engine_waits_resumes_at_the_next_look(model: Path, tmp_path: Path) -> None:
    folder, members = tmp_path / "evaluation", dict[int, str]()

    def interrupt() -> None:
        members.update(processes_of(folder))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_by(looker(tmp_path), ask(model, looks=LOOKS), folder, settles=Judge(at=2, then=interrupt))
    assert len(members) >= 2, "the guard and the worker"
    assert all_gone(members)
    judge = Judge()
    evaluate_by(looker(tmp_path), ask(model, looks=LOOKS), folder, settles=judge)
    assert judge.seen == ["look 1", "look 2", "look 3"]
    assert (folder / "started").read_text() == "xx"
    assert (folder / "scored").read_text() == "123"


JUDGE_FOR_EVER = """
import sys, time
from pathlib import Path
from fp8pipe.evaluate import evaluate
from fp8pipe.evaluate.request import EvalRequest
sys.executable = sys.argv[1]
def settles(report, look):
    print(look, flush=True)
    time.sleep(600)
evaluate(EvalRequest.load(Path(sys.argv[2])), Path(sys.argv[3]), settles=settles)
"""


def test_an_engine_that_waits_for_a_killed_run_ends(model: Path, tmp_path: Path) -> None:
    folder, asked = tmp_path / "evaluation", ask(model, looks=LOOKS).save(tmp_path / "asked.json")
    command = [sys.executable, "-c", JUDGE_FOR_EVER, looker(tmp_path), str(asked), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=importing_the_repository()) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "1\n"
        members = processes_of(folder)
        run.kill()
    assert len(members) >= 2, "the guard and the worker"
    assert all_gone(members)


def test_waiting_for_a_long_verdict_is_no_stall(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8pipe.evaluate.STALL_S", 4.0)
    judge = Judge(at=1, then=lambda: time.sleep(5))
    report = evaluate_by(looker(tmp_path), ask(model, looks=LOOKS), tmp_path / "evaluation", settles=judge)
    assert report.table == "look 1"


def test_an_engine_that_runs_out_of_memory_at_a_later_look_does_not_have_the_first_judged_again(
    model: Path, tmp_path: Path
) -> None:
    worker = "import os; look == 2 and len((folder / 'started').read_text()) == 1 and os.kill(os.getpid(), 9)"
    folder, judge = tmp_path / "evaluation", Judge()
    report = evaluate_by(looker(tmp_path, worker), ask(model, looks=LOOKS), folder, settles=judge)
    assert judge.seen == ["look 1", "look 2", "look 3"]
    assert len(report.retries) == 1
    again = ask(model, looks=LOOKS)
    assert evaluate_by(looker(tmp_path, "raise SystemExit(1)"), again, folder) == report


def test_a_candidate_altered_before_the_verdict_voids_that_look_alone(model: Path, tmp_path: Path) -> None:
    asked, folder = ask(model, looks=LOOKS, role="candidate"), tmp_path / "evaluation"
    worker = f"look == 2 and open({str(model / 'config.json')!r}, 'w').write('{{\"changed\": 1}}')"
    judge = Judge()
    with pytest.raises(SourceChanged):
        evaluate_by(looker(tmp_path, worker), asked, folder, settles=judge)
    assert judge.seen == ["look 1"]
    assert not (folder / "report.json").exists()
    (model / "config.json").write_text("{}")
    assert evaluate_by(looker(tmp_path), asked, folder).table == "look 3"
    assert (folder / "scored").read_text() == "1223"


@pytest.mark.vllm
def test_looks_of_one_engine_equal_those_of_two(
    warm_python: str, tiny_llama: Path, task_dir: Path, tmp_path: Path
) -> None:
    """Half of the documents, then all of them: the first half is not scored again, and its prompts stay the same."""
    asked = ask(tiny_llama, make_suite(task_dir), looks=(0.5, 1.0))
    seen: list[EvalReport] = []
    whole = evaluate_by(warm_python, asked, tmp_path / "one", settles=collecting(seen))
    half = evaluate_by(warm_python, asked, tmp_path / "two", settles=lambda report, look: look == 1)
    resumed = evaluate_by(warm_python, asked, tmp_path / "two")
    assert [timeless(one) for one in seen] == [timeless(half), timeless(resumed)]
    assert timeless(whole) == timeless(resumed)
    for before, after in zip(half.tasks, whole.tasks, strict=True):
        n = len(before.doc_ids)
        assert n == -(-len(after.doc_ids) // 2)
        assert after.doc_ids[:n] == before.doc_ids
        assert after.prompt_hashes[:n] == before.prompt_hashes
        assert [m.values[:n] for m in after.metrics] == [m.values for m in before.metrics]


@pytest.mark.vllm
def test_the_engines_noise_is_measured_at_the_first_look_and_used_again_by_another_suite(
    warm_python: str, tiny_llama: Path, task_dir: Path, tmp_path: Path
) -> None:
    twice = {"tiny_generate": TaskSpec(num_fewshot=2, samples=10, repeat=True)}
    first, rates = make_suite(task_dir, **twice), tmp_path / "rates"
    seen: list[EvalReport] = []
    asked = ask(tiny_llama, first, looks=(0.5, 1.0), rates=rates)
    evaluate_by(warm_python, asked, tmp_path / "one", settles=collecting(seen))
    assert [{(flip.n, flip.suite) for flip in report.flips} for report in seen] == [{(5, None)}] * 2
    second = make_suite(task_dir, tiny_choose=TaskSpec(), **twice).model_copy(update={"name": "other"})
    notes: list[str] = []
    report = evaluate_by(
        warm_python, ask(tiny_llama, second, rates=rates), tmp_path / "two", lambda event: notes.append(event.note)
    )
    assert report.flips == tuple(flip.model_copy(update={"suite": "tiny"}) for flip in seen[0].flips)
    assert not any("again" in note for note in notes)


def collecting(seen: list[EvalReport]) -> Settles:
    def settles(report: EvalReport, look: int) -> bool:
        seen.append(report)
        return False

    return settles


def timeless(report: EvalReport) -> dict[str, Any]:
    return report.model_dump(mode="json", exclude={"seconds"})
