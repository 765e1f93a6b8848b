"""Fixtures of this room's tests: tiny tasks and models, and two reports by real vLLM that many tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.evaluation import ask, evaluate_by, make_fp8_kv_twin, make_full_suite, make_tasks, make_tiny_llama
from support.machine import require_fp8_kv_cache

from fp8pipe.config import EvalSuite
from fp8pipe.progress import ProgressEvent
from fp8pipe.records import EvalReport


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("suite") / "tasks")


@pytest.fixture(scope="session")
def full_suite(task_dir: Path) -> EvalSuite:
    return make_full_suite(task_dir)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def baseline(
    warm_python: str, tiny_llama: Path, full_suite: EvalSuite, tmp_path_factory: pytest.TempPathFactory
) -> EvalReport:
    return evaluate_by(warm_python, ask(tiny_llama, full_suite), tmp_path_factory.mktemp("baseline"))


@pytest.fixture(scope="session")
def candidate(
    warm_python: str, tiny_llama: Path, full_suite: EvalSuite, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvalReport, list[ProgressEvent]]:
    """The FP8 twin's report, and the progress on the way to it."""
    require_fp8_kv_cache()
    folder = tmp_path_factory.mktemp("candidate")
    fp8, events = make_fp8_kv_twin(tiny_llama, folder / "fp8"), []
    request = ask(fp8, full_suite, role="candidate", kv_cache_dtype="fp8")
    return evaluate_by(warm_python, request, folder / "evaluation", events.append), events


@pytest.fixture(scope="session")
def group_run(task_dir: Path) -> tuple[Any, dict[str, Any]]:
    """The task of a group, and lm-eval's results of its own random model on it."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.dummy import DummyLM
    from lm_eval.tasks import TaskManager
    from support.evaluation import make_suite

    from fp8pipe.config import TaskSpec
    from fp8pipe.evaluate.tasks import load_tasks

    class Offline(DummyLM):
        tokenizer = None  # lm-eval's would be downloaded

    [task] = load_tasks(make_suite(task_dir, tiny_group=TaskSpec(num_fewshot=1, samples=20)), limit=None)
    scored: list[Any] = list(task.scored())
    options: dict[str, Any] = {"samples": task.sample_ids(), "task_manager": TaskManager(include_defaults=False)}
    results = simple_evaluate(model=Offline(), tasks=scored, bootstrap_iters=100, **options)
    assert results is not None
    return task, dict(results)
