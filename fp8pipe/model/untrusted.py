"""Text and JSON of untrusted files: bounded in length, depth and memory, strict where readers disagree.

In: bytes. Out: the value, or why it is not one. Nothing in here raises on content.

Python's own parser needs up to 70 bytes for each bracket or comma, so that 100 MB of `[],[],` would take gigabytes:
brackets and commas are counted before anything is parsed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_JSON_BYTES = 256_000_000
"""An index of a million tensors is 100 MB."""

MAX_JSON_TOKENS = 6_000_000
"""Brackets and commas; a header of half a million tensors has 5 million. Parsed, that many take 0.5 GB."""

MAX_UNICODE_BYTES = 16_000_000
"""Beyond it text must be ASCII: one wide character makes Python keep four bytes for each of the others."""

MAX_JSON_DEPTH = 64
"""Deeper is no config, and would make Python's own repr fail."""


MAX_FILE_BYTES = 1_000_000_000
"""Of any file beside the weights; the largest tokenizers have 40 MB."""

MAX_NAME = 1000
"""Characters in the name of a tensor or a file."""

MAX_LAYERS = 10_000
"""What a config may give as a number of layers: libraries make lists of that length, some in quadratic time."""

_CONSTANTS: Mapping[str, float] = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Single objects: in Python a container equals another with the same NaN in it."""


def parse_json(data: bytes, *, constants: bool = False) -> tuple[Any, str | None]:
    """The value and None, or None and the reason. Duplicate keys are reported beside the value.

    constants: accept NaN and Infinity, which are not JSON, as Python's readers of config.json do."""
    if reason := _too_much(data):
        return None, reason
    duplicates: list[str] = []

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            duplicates.extend(key for key, _ in pairs if key in seen or seen.add(key))
        return result

    def constant(text: str) -> float:
        if not constants:
            raise ValueError(f"{text} is not JSON")
        return _CONSTANTS[text]

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=as_dict, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {clip(error)}"
    if duplicates:
        return value, f"key {clip(duplicates[0])!r} twice"
    if _is_deeper_than(value, MAX_JSON_DEPTH):
        return None, f"nested more than {MAX_JSON_DEPTH} deep"
    if rb"\ud" in data.lower() and not _is_encodable(value):
        return None, "half a character (a lone surrogate) in a text"
    return value, None


def parse_config(data: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The object in a JSON file that Python reads, such as config.json, or None; and what is wrong with it, or None."""
    value, problem = parse_json(data, constants=True)
    if value is not None and not isinstance(value, dict):
        return None, f"a {type(value).__name__}"
    if problem is None and value is not None and (found := _absurd_count(value)):
        return None, found
    return value, problem


def _absurd_count(config: dict[str, Any]) -> str | None:
    """A number of layers that no model has, or that is no whole number, with its key, wherever it stands."""
    waiting: list[Any] = [config]
    while waiting:
        item = waiting.pop()
        waiting.extend(item.values() if isinstance(item, dict) else item)
        waiting = [inner for inner in waiting if isinstance(inner, dict | list)]
        for key, value in item.items() if isinstance(item, dict) else ():
            if key.endswith(("layer", "layers")) and isinstance(value, int | float) and value > MAX_LAYERS:
                return f"{clip(key)}: {value}, more layers than any model has"
            if key == "num_hidden_layers" and isinstance(value, str | float):
                return f"{key}: {clip(repr(value))}, not a whole number"
    return None


def too_long(size: int) -> str:
    """Why a file of `size` bytes is not read."""
    return f"{size} bytes, more than any real file of this kind"


def _too_much(data: bytes) -> str | None:
    if len(data) > MAX_JSON_BYTES:
        return too_long(len(data))
    if len(data) > MAX_UNICODE_BYTES and not data.isascii():
        return f"{len(data)} bytes that are not all ASCII, more than any real file of this kind"
    tokens = sum(data.count(mark) for mark in (b"[", b"{", b","))
    return f"{tokens} brackets and commas, more than any real file has" if tokens > MAX_JSON_TOKENS else None


def _is_deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        lists = [item if isinstance(item, list) else item.values() for item in level if isinstance(item, dict | list)]
        level = [inner for items in lists for inner in items if isinstance(inner, dict | list)]
    return bool(level)


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_plain(name: str) -> bool:
    """Whether a name can be shown and stored anywhere: printable, and no longer than any real one."""
    return len(name) <= MAX_NAME and name.isprintable()


def clip(text: object, limit: int = 200) -> str:
    """Text from an untrusted file: on one line, not too long, without control characters, and encodable."""
    shown = str(text)
    if len(shown) > limit:
        shown = f"{shown[:limit]}... ({len(shown)} characters)"
    return printable(" ".join(shown.split()))


def printable(text: str) -> str:
    """The text with control characters, and what cannot be encoded, as escapes: a terminal obeys some of them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
