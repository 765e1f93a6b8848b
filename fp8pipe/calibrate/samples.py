"""Rows of a dataset in, token ids of the chosen samples out.

Rows are visited in a seeded permutation (numpy's, the one `datasets.Dataset.shuffle` uses); blank rows are passed over;
each chosen sample is truncated to max_seq_len and never padded. Whatever makes the data unfit is said here, before any
weight is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from fp8pipe.calibrate.rows import Rows
from fp8pipe.config import CalibrationSpec
from fp8pipe.errors import CalibrationDataError


@dataclass(frozen=True, slots=True)
class Samples:
    """What is run through the model."""

    indices: tuple[int, ...]
    """Row numbers in the dataset, in the order in which they are run."""
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens over all samples."""
        return sum(map(len, self.token_ids))

    def sha256(self) -> str:
        """Hash of the token ids, sample by sample."""
        return hashlib.sha256(json.dumps(self.token_ids, separators=(",", ":")).encode()).hexdigest()


def tokenizer_of(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's own tokenizer (transformers' tokenizers have no common static type)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationDataError(
            f"{folder}: its tokenizer cannot be loaded ({error}); the tokenizer's files belong beside the weights"
        ) from error


def context_of(folder: Path, *, trust_remote_code: bool = False) -> int | None:
    """The longest sequence that the model takes; None when its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def choose_samples(spec: CalibrationSpec, rows: Rows, tokenizer: Any, context: int | None) -> Samples:
    """The token ids of `spec.num_samples` of the rows.

    context: the longest sequence that the model takes, None when unknown. Raises CalibrationDataError when the data is
    empty, too short, or has no usable column.
    """
    encode = _encoder(spec, rows, tokenizer)
    indices, token_ids = [], []
    for index in _permutation(len(rows), spec.seed):
        ids = encode(rows[index])[: spec.max_seq_len]
        if ids:
            indices.append(index)
            token_ids.append(tuple(ids))
        if len(indices) == spec.num_samples:
            break
    samples = Samples(tuple(indices), tuple(token_ids))
    _check(spec, samples, len(rows), context)
    return samples


def _check(spec: CalibrationSpec, samples: Samples, rows: int, context: int | None) -> None:
    if len(samples.indices) < spec.num_samples:
        raise CalibrationDataError(
            f"{spec.dataset}: expected {spec.num_samples} samples, found {len(samples.indices)} that are not blank "
            f"among {rows} rows; lower num_samples or give more data"
        )
    longest = max(map(len, samples.token_ids))
    if context is not None and longest > context:
        index = samples.indices[[len(ids) for ids in samples.token_ids].index(longest)]
        raise CalibrationDataError(
            f"{spec.dataset}: row {index} has {longest} tokens, the model's context is {context}; "
            f"set max_seq_len to {context} or less"
        )


def _permutation(rows: int, seed: int) -> list[int]:
    import numpy

    return numpy.random.default_rng(seed).permutation(rows).tolist()


# ---------------------------------------------------------------------------------------------- rows -> token ids

Encode = Callable[[dict[str, Any]], list[int]]


def _encoder(spec: CalibrationSpec, rows: Rows, tokenizer: Any) -> Encode:
    """The function from a row to token ids, by the column that the data has."""
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
            f"{spec.dataset} holds chat messages and the model's tokenizer has no chat template; "
            "set calibration.chat_template: none to join their contents"
        )

    def encode(row: dict[str, Any]) -> list[int]:
        messages = _field(spec, row, "messages")
        try:  # the template writes the special tokens itself
            text = tokenizer.apply_chat_template(messages, tokenize=False) if messages else ""
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise CalibrationDataError(
                f"{spec.dataset}: the model's chat template refuses a row ({error}); its roles are "
                f"{[_role(message) for message in messages][:8]}: give data that it takes, or set "
                "calibration.chat_template: none to join the contents"
            ) from error
        return _encode(tokenizer, text, special_tokens=False)

    return encode


def _encode(tokenizer: Any, text: str, special_tokens: bool) -> list[int]:
    """Token ids; none for blank text, so that a lone BOS is no sample."""
    return tokenizer(text, add_special_tokens=special_tokens)["input_ids"] if text.strip() else []


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
