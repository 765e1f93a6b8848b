"""A row of the dataset -> token ids: text is encoded directly, messages go through the chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fp8pipe.calibrate.dataset import Rows
from fp8pipe.config import CalibrationSpec
from fp8pipe.errors import CalibrationDataError
from fp8pipe.model.untrusted import clip

Encode = Callable[[dict[str, Any]], list[int]]


def tokenizer_of(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's own tokenizer (transformers' tokenizers have no common static type)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except BaseException as error:
        if not _is_of_library(error):
            raise
        raise CalibrationDataError(
            f"{folder}: cannot load the tokenizer ({_reason(error)}); its files must be in the same folder as the "
            "weights"
        ) from error


def encoder_for(spec: CalibrationSpec, rows: Rows, tokenizer: Any) -> Encode:
    """The function from a row to token ids, chosen by the first row's columns. A blank row gives no ids.

    Raises CalibrationDataError when there are no rows, no usable column, or chat messages without a chat template; so
    does the function for a row that it cannot encode.
    """
    if len(rows) == 0:
        raise CalibrationDataError(
            f"{spec.dataset}: the dataset is empty; give data with a `messages` or `text` column"
        )
    columns = set(rows[0])
    if "messages" in columns:
        return _chat_encoder(spec, tokenizer)
    if "text" in columns:
        return lambda row: _encode(tokenizer, _field(spec, row, "text"), special_tokens=True)
    raise CalibrationDataError(
        f"{spec.dataset}: expected a `messages` or `text` column, found {', '.join(sorted(columns))}; rename one"
    )


def _chat_encoder(spec: CalibrationSpec, tokenizer: Any) -> Encode:
    if spec.chat_template == "none":
        return lambda row: _encode(tokenizer, _joined(spec, _field(spec, row, "messages")), special_tokens=True)
    if not tokenizer.chat_template:
        raise CalibrationDataError(
            f"{spec.dataset} contains chat messages, but the model's tokenizer has no chat template; "
            "set calibration.chat_template: none to join the contents of the messages"
        )

    def encode(row: dict[str, Any]) -> list[int]:
        messages = _field(spec, row, "messages")
        try:  # the template writes the special tokens itself
            text = tokenizer.apply_chat_template(messages, tokenize=False) if messages else ""
        except Exception as error:
            raise CalibrationDataError(
                f"{spec.dataset}: the model's chat template rejects a row ({_reason(error)}) with the roles "
                f"{[_role(message) for message in messages][:8]}; give data that it accepts, or set "
                "calibration.chat_template: none to join the contents of the messages"
            ) from error
        return _encode(tokenizer, text, special_tokens=False)

    return encode


def _encode(tokenizer: Any, text: str, special_tokens: bool) -> list[int]:
    """Token ids; none for blank text, so that a lone BOS never becomes a sample."""
    if not text.strip():
        return []
    try:
        return tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
    except BaseException as error:
        if not _is_of_library(error):
            raise
        raise CalibrationDataError(
            f"the model's tokenizer fails on a row ({_reason(error)}); mend its files, or download the model again"
        ) from error


def _is_of_library(error: BaseException) -> bool:
    """Whether a tokenizer's own code raised the error. It raises plain Exceptions, and a panic in Rust is not even one;
    it is known by its name alone, since no module exports it."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _reason(error: BaseException) -> str:
    return clip(error) or type(error).__name__  # a MemoryError says nothing


def _joined(spec: CalibrationSpec, messages: list[Any]) -> str:
    contents = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str):
            found = type(content).__name__
            raise CalibrationDataError(
                f"{spec.dataset}: column messages: expected `content` to be a str in every message, found {found}"
            )
        contents.append(content)
    return "\n".join(contents)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else type(message).__name__


def _field(spec: CalibrationSpec, row: dict[str, Any], column: str) -> Any:
    value = row.get(column)
    expected = list if column == "messages" else str
    if not isinstance(value, expected):
        raise CalibrationDataError(
            f"{spec.dataset}: column {column}: expected {expected.__name__} in every row, found {type(value).__name__}"
        )
    return value
