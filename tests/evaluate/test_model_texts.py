"""A model's own tokenizer and chat template that fail are the model's fault, however they fail: exit code 2."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from support.evaluation import ask, evaluate_by, interpreter

from fp8pipe.config import EvalSuite
from fp8pipe.errors import EngineFailed, InputError
from fp8pipe.evaluate import texts


class PanicException(BaseException):
    """As pyo3 raises it where Rust panics."""


class Tokenizer:
    """Renders its template as transformers does; panics on demand."""

    def __init__(self, *, template: str | None = None, panics: bool = False) -> None:
        self.chat_template, self._panics = template, panics

    def __call__(self, text: str) -> list[int]:
        if self._panics:
            raise PanicException("index out of bounds")
        return [1]

    def apply_chat_template(self, messages: list[Any], **_: Any) -> str:
        return ImmutableSandboxedEnvironment().from_string(self.chat_template or "").render(messages=messages)


def test_a_tokenizer_that_panics_is_bad_input_and_its_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(InputError, match=r"tokenizer\.json: the model's tokenizer fails .*index out of bounds"):
        texts.try_out(str(tmp_path), lambda: Tokenizer(panics=True), templated=False)


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{% set a = namespace(t='aa') %}{% for i in range(64) %}{% set a.t = a.t ~ a.t %}{% endfor %}",
    ],
    ids=["recursion", "error", "memory"],
)
def test_a_template_that_fails_is_bad_input_and_its_file_is_named(tmp_path: Path, template: str) -> None:
    (tmp_path / "chat_template.jinja").touch()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(InputError, match=r"chat_template\.jinja: the model's chat template fails"):
        texts.try_out(str(tmp_path), lambda: Tokenizer(template=template), templated=True)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    texts.try_out(str(tmp_path), lambda: Tokenizer(template=template), templated=False)


def test_what_works_passes_and_a_missing_package_is_not_the_models_fault(tmp_path: Path) -> None:
    texts.try_out(str(tmp_path), lambda: Tokenizer(template="{{ messages[0].content }}"), templated=True)
    with pytest.raises(ImportError), texts.bounded(str(tmp_path), "tokenizer"):
        raise ImportError("sentencepiece")


NOTE = """
    import signal
    message = {"note": "trying the tokenizer and the chat template"}
    os.write(int(os.environ["SUPERVISE_CHANNEL"]), json.dumps(message).encode() + b"\\n")
"""


@pytest.mark.parametrize(
    ("worker", "words"),
    [
        ("import signal; os.kill(os.getpid(), signal.SIGALRM)", "took too long"),
        (f"{NOTE}    os.kill(os.getpid(), signal.SIGSEGV)", "crashed"),
    ],
)
def test_a_call_that_ends_the_worker_is_bad_input(model: Path, tmp_path: Path, worker: str, words: str) -> None:
    with pytest.raises(InputError, match=f"tokenizer or chat template {words}"):
        evaluate_by(interpreter(tmp_path, worker), ask(model), tmp_path / "evaluation")


def test_a_crash_of_the_engine_is_not_the_tokenizers(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed):
        evaluate_by(interpreter(tmp_path, "import signal; os.kill(os.getpid(), signal.SIGSEGV)"), ask(model), tmp_path)


def test_a_call_that_does_not_end_ends_the_process(tmp_path: Path) -> None:
    code = f"""
from fp8pipe.evaluate import texts
texts._LIMIT_S, texts._EACH_S = 0.2, 0
with texts.bounded({str(tmp_path)!r}, "chat template"):
    while True:
        pass
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGALRM


@pytest.mark.vllm
def test_a_tokenizer_that_cannot_be_loaded_is_bad_input_before_vllm_starts(
    warm_python: str, tiny_llama: Path, full_suite: EvalSuite, tmp_path: Path
) -> None:
    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(InputError, match=r"broken/tokenizer\.json: the model's tokenizer fails"):
        evaluate_by(warm_python, ask(broken, full_suite), tmp_path / "evaluation")
    assert "Initializing a V1 LLM engine" not in (tmp_path / "evaluation" / "worker.log").read_text()
