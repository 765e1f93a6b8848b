"""Text and JSON of untrusted files: bounded in length, depth and memory, strict where readers disagree.

In: bytes. Out: the value, or why it is not one. Nothing in here raises on content.

Python's own parser needs up to 70 bytes for each bracket or comma, so that 100 MB of `[],[],` would take gigabytes:
brackets and commas are counted before anything is parsed.
"""

from __future__ import annotations

import json
from typing import Any

MAX_JSON_BYTES = 256_000_000
"""An index of a million tensors is 100 MB."""

MAX_JSON_TOKENS = 6_000_000
"""Brackets and commas; a header of half a million tensors has 5 million. Parsed, that many take 0.5 GB."""

MAX_UNICODE_BYTES = 16_000_000
"""Beyond it text must be ASCII: one wide character makes Python keep four bytes for each of the others."""

MAX_JSON_DEPTH = 64
"""Deeper is no config, and would make Python's own repr fail."""


def parse_json(data: bytes) -> tuple[Any, str | None]:
    """The value and None, or None and the reason. Duplicate keys are reported beside the value; NaN is refused."""
    if reason := _too_much(data):
        return None, reason
    duplicates: list[str] = []

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            duplicates.extend(key for key, _ in pairs if key in seen or seen.add(key))
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=as_dict, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {clip(error)}"
    if duplicates:
        return value, f"key {clip(duplicates[0])!r} twice"
    if _is_deeper_than(value, MAX_JSON_DEPTH):
        return None, f"nested more than {MAX_JSON_DEPTH} deep"
    return value, None


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


def clip(text: object, limit: int = 200) -> str:
    """Text from an untrusted file: on one line, not too long, and encodable (JSON may spell lone surrogates)."""
    shown = str(text)
    if len(shown) > limit:
        shown = f"{shown[:limit]}... ({len(shown)} characters)"
    return " ".join(shown.encode("utf-8", "replace").decode().split())
