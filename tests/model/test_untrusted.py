"""JSON and text of strangers: what readers disagree about is refused, and nothing in it reaches a terminal."""

from __future__ import annotations

import math

import pytest

from fp8pipe.model.untrusted import MAX_JSON_TOKENS, clip, is_plain, parse_json, printable


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "not JSON"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested more than 64 deep"),
        (b"9" * 5000, "not JSON"),
        (b'{"a": 1, "a": 1}', "key 'a' twice"),
        (b'{"a": "\\uD800"}', "half a character"),
        (b'{"\\ud800": 1}', "half a character"),
        (b"[" + b"," * MAX_JSON_TOKENS, "brackets and commas"),
        (b'"' + "\u00e9".encode() * 9_000_000 + b'"', "not all ASCII"),
        (b"\xff", "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_json_that_readers_may_not_agree_on_has_a_reason(content: bytes, reason: str) -> None:
    assert reason in (parse_json(content)[1] or "")


def test_a_whole_character_may_be_escaped() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == ("\U0001f600", None)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_are_not_json_are_read_only_where_python_reads_them(constant: str) -> None:
    content = f'{{"limit": [0.0, {constant}]}}'.encode()
    assert parse_json(content)[1] == f"not JSON: {constant} is not JSON"
    value, problem = parse_json(content, constants=True)
    assert problem is None and not math.isfinite(value["limit"][1])
    assert value == parse_json(content, constants=True)[0], "equal files are equal, even with NaN in them"


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\u202e", "\ud800", "a" * 1001])
def test_no_name_that_a_terminal_obeys_or_that_fills_it_is_plain(name: str) -> None:
    assert not is_plain(name)
    assert is_plain(printable(name)[:1000])
    assert clip(name).isprintable() and len(clip(name)) < 300


def test_an_ordinary_name_is_plain_and_stays_as_it_is() -> None:
    name = "modèle.层.0.weight"
    assert is_plain(name) and printable(name) == clip(name) == name
