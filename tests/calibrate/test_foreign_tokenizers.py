"""A model's own tokenizer and chat template that fail are the model's fault, however they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fp8pipe.calibrate.tokenization import encoder_for, tokenizer_of
from fp8pipe.config import CalibrationSpec
from fp8pipe.errors import CalibrationDataError


class PanicException(BaseException):
    """As pyo3 raises it where Rust panics."""


class Panicking:
    """A tokenizer whose Rust code panics."""

    chat_template = "{{ messages }}"

    def __call__(self, text: str, **_: Any) -> Any:
        raise PanicException("index out of bounds")

    def apply_chat_template(self, messages: list[Any], **_: Any) -> str:
        return ImmutableSandboxedEnvironment().from_string(self.chat_template).render(messages=messages)


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "BPE"}}', "[" * 10_000])
def test_tokenizer_that_cannot_be_loaded_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CalibrationDataError, match="cannot load the tokenizer"):
        tokenizer_of(tmp_path)


def test_tokenizer_that_panics_is_refused() -> None:
    encode = encoder_for(CalibrationSpec(dataset="rows.jsonl"), [{"text": "a"}], Panicking())
    with pytest.raises(CalibrationDataError, match="index out of bounds"):
        encode({"text": "a"})


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**12) %}{% endfor %}",
        "{{ 'a'.encode('utf-8').decode.nothing() }}",
        "{{ ''.join(messages[0].content, 1, 2) }}",
        "{{ namespace().update.x() }}",
        "{{ 'a'.encode('no-such-codec') }}",
    ],
)
def test_template_that_raises_is_refused_whatever_it_raises(template: str) -> None:
    tokenizer, rows = Panicking(), [{"messages": [{"role": "user", "content": "a"}]}]
    tokenizer.chat_template = template
    encode = encoder_for(CalibrationSpec(dataset="rows.jsonl"), rows, tokenizer)
    with pytest.raises(CalibrationDataError, match="the model's chat template rejects a row"):
        encode(rows[0])
