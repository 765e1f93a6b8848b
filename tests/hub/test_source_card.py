"""The front matter of other people's cards: what is taken from it, in whose spelling, and what can do no harm."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from support.tiny_models import make_model

from fp8pipe.hub.source import resolve
from fp8pipe.hub.source_card import MAX_CARD_BYTES, SourceCard, parse_source_card, read_source_card


def card(front_matter: str) -> SourceCard:
    return parse_source_card(f"---\n{front_matter}\n---\n# A model\n")


@pytest.mark.parametrize(
    ("written", "codes"),
    [
        ("English", ("en",)),
        ("en", ("en",)),
        ("[English, de, zh-CN, pt_BR]", ("en", "de", "zh", "pt")),
        ("English, German", ("en", "de")),
        ("no", ("no",)),  # Norwegian: a reader of YAML 1.1 sees false
        ("[en, en, 'on']", ("en", "on")),
        ("multilingual", ("multilingual",)),
        ("\n- French\n- fil", ("fr", "fil")),
    ],
)
def test_languages_become_codes(written: str, codes: tuple[str, ...]) -> None:
    found = card(f"language: {written}")
    assert found.texts["language"] == codes
    assert found.problems == ()


def test_what_the_hub_would_not_take_is_dropped_and_reported() -> None:
    found = card("language: [42, Klingon]\npipeline_tag: 'Text!Generation'\nlicense: {a: b}")
    assert found.texts == {}
    reported = " ".join(found.problems)
    assert all(f"`{key}`" in reported for key in ("language", "pipeline_tag", "license"))


def test_a_task_is_spelled_as_the_hub_does() -> None:
    assert card("pipeline_tag: Image_Text To Text").one("pipeline_tag") == "image-text-to-text"


def test_scalars_stay_text_and_several_are_no_single_one() -> None:
    found = card("license: 2024-99-99\nlicense_name: 3.10\nlanguage: [en, de]")
    assert found.one("license") == "2024-99-99"
    assert found.one("license_name") == "3.10"
    assert found.one("language") is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "no README.md"),
        ("", "no front matter"),
        ("# A model", "no front matter"),
        ("---" + "\n" * 90_000, "no front matter"),
        ("---\nlicense: " + "[" * 5000 + "\n---\n", "not YAML"),
        ("---\n: [broken\n---\n", "not YAML"),
        ("---\n? [a]\n: b\n---\n", "not YAML"),
        ("---\nlicense: a\x00b\n---\n", "not YAML"),
        ("---\na: &a mit\nlicense: *a\n---\n", "an alias"),
        ("---\n- a list\n---\n", "no mapping"),
        ("---\nlicense: " + "x" * 1001 + "\n---\n", "`license`"),
        ("---\nlicense: [" + "x," * 1001 + "]\n---\n", "`license`"),
        ("---\nlicense: !!python/object/apply:os.system [id]\n---\n", "`license` in the source's README.md is not"),
    ],
)
def test_a_card_that_says_nothing_clear_is_a_problem_and_no_crash(text: str | None, problem: str) -> None:
    found = parse_source_card(text)
    assert problem in " ".join(found.problems) or found.texts == {"license": ("id",)}
    assert "\x00" not in "".join(found.problems)


def test_a_card_with_windows_line_ends_and_a_byte_order_mark_is_read() -> None:
    assert parse_source_card("\ufeff---\r\nlicense: mit\r\n---\r\n# x").one("license") == "mit"


def test_aliases_that_stand_for_gigabytes_take_no_memory() -> None:
    bomb = "\n".join(["a0: &a0 [lol]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])
    tracemalloc.start()
    found = card(f"{bomb}\nlicense: mit")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "an alias" in found.problems[0]
    assert peak < 20_000_000


def test_the_card_is_read_at_its_commit_whatever_its_case_and_only_its_first_megabyte(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    assert read_source_card(resolve(str(folder))) is None
    (folder / "Readme.md").write_bytes(b"---\nlicense: mit\n---\n" + b"x" * MAX_CARD_BYTES)
    text = read_source_card(resolve(str(folder)))
    assert text is not None and len(text) == MAX_CARD_BYTES
    assert parse_source_card(text).one("license") == "mit"
