"""The card of a source model: somebody else's README.md, of which only what it says clearly is used.

    read_source_card(snapshot)    the text, its first megabyte, at the pinned commit
    parse_source_card(text)       its front matter, in the Hub's spelling, and what is wrong with it

No value becomes anything but text: `2024-99-99` is no date, and `no` is Norwegian. Aliases are refused, because a few
lines of them can stand for gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from fp8pipe.hub.source import read_range
from fp8pipe.model.untrusted import clip, is_plain
from fp8pipe.records import Snapshot

MAX_CARD_BYTES = 1_000_000
MAX_FRONT_MATTER = 100_000
"""Characters of a card that are searched for front matter."""
MAX_VALUES = 1000
"""Entries of one list; there are 200 languages."""

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_TEXTS = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LANGUAGES = {
    "arabic": "ar",
    "bengali": "bn",
    "bulgarian": "bg",
    "catalan": "ca",
    "chinese": "zh",
    "croatian": "hr",
    "czech": "cs",
    "danish": "da",
    "dutch": "nl",
    "english": "en",
    "estonian": "et",
    "finnish": "fi",
    "french": "fr",
    "german": "de",
    "greek": "el",
    "hebrew": "he",
    "hindi": "hi",
    "hungarian": "hu",
    "indonesian": "id",
    "italian": "it",
    "japanese": "ja",
    "korean": "ko",
    "latvian": "lv",
    "lithuanian": "lt",
    "malay": "ms",
    "norwegian": "no",
    "persian": "fa",
    "polish": "pl",
    "portuguese": "pt",
    "romanian": "ro",
    "russian": "ru",
    "serbian": "sr",
    "slovak": "sk",
    "slovenian": "sl",
    "spanish": "es",
    "swahili": "sw",
    "swedish": "sv",
    "tamil": "ta",
    "telugu": "te",
    "thai": "th",
    "turkish": "tr",
    "ukrainian": "uk",
    "urdu": "ur",
    "vietnamese": "vi",
    "welsh": "cy",
    "mandarin": "zh",
    "farsi": "fa",
}
"""Names that people write where the Hub wants a code of ISO 639."""


@dataclass(frozen=True, slots=True)
class SourceCard:
    """What a source's card says."""

    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`license`, `license_name`, `license_link`, `language`, `pipeline_tag`; none is empty."""
    content: Mapping[str, Any] = field(default_factory=dict)  # Any: somebody else's YAML; lists, mappings and texts
    """The whole front matter, every scalar as text."""
    problems: tuple[str, ...] = ()
    """What is wrong with it, a sentence each."""

    def one(self, key: str) -> str | None:
        """The only value of a field; None if there is none, or several."""
        values = self.texts.get(key, ())
        return values[0] if len(values) == 1 else None


def read_source_card(snapshot: Snapshot) -> str | None:
    """The first megabyte of the source's README.md; None if it has none."""
    for file in snapshot.files:
        if file.name.lower() == "readme.md":
            return read_range(snapshot, file.name, 0, min(file.size, MAX_CARD_BYTES)).decode(errors="replace")
    return None


def parse_source_card(text: str | None) -> SourceCard:
    """What a card says clearly. Never raises: what it does not say clearly is a problem."""
    if text is None:
        return SourceCard(problems=("the source has no README.md",))
    found = _FRONT_MATTER.match(text[:MAX_FRONT_MATTER].replace("\r\n", "\n"))
    if found is None:
        return SourceCard(problems=("the source's README.md has no front matter",))
    content, problem = parse_yaml(found.group(1))
    if problem:
        return SourceCard(problems=(f"the front matter of the source's README.md is not YAML: {problem}",))
    if not isinstance(content, dict):
        return SourceCard(problems=("the front matter of the source's README.md is no mapping of keys",))
    texts, problems = {}, []
    for key in _TEXTS:
        if key not in content:
            continue
        values = _values(content[key])
        if values is not None and key == "language":
            values = [part.strip() for value in values for part in value.split(",")]  # `English, German`
        if values is None:
            problems.append(f"`{key}` in the source's README.md is neither a text nor a list of texts")
        elif kept := tuple(dict.fromkeys(filter(None, map(_SPELLING.get(key, str), values)))):
            texts[key] = kept
        elif values:
            problems.append(f"`{key}` in the source's README.md is not one of the Hub's: {clip(', '.join(values))}")
    return SourceCard(texts, content, tuple(problems))


def parse_yaml(text: str) -> tuple[Any, str]:  # Any: somebody else's YAML; lists, mappings and texts
    """The value of YAML whose every scalar is a text, or None and why it is none."""
    try:
        return yaml.load(text, _Texts), ""
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return None, clip(error)


class _Texts(yaml.BaseLoader):
    """Every scalar is a text, and nothing is an alias."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*{self.peek_event().anchor}), which is not followed")
        return super().compose_node(parent, index)


def _values(value: object) -> list[str] | None:
    """One text or several, without empty ones; None if it is something else, or longer than a person would write."""
    listed = value if isinstance(value, list) else [value]
    texts = [item.strip() for item in listed if isinstance(item, str) and is_plain(item)]
    return None if len(texts) < len(listed) or len(listed) > MAX_VALUES else [text for text in texts if text]


def _language(value: str) -> str | None:
    """The code of ISO 639 that a name, a code or a locale means; None if it is none."""
    if code := _LANGUAGES.get(value.lower()):
        return code
    if value.lower() in {"code", "multilingual"}:
        return value.lower()
    found = re.fullmatch(r"([A-Za-z]{2,3})(?:[-_][A-Za-z0-9]+)*", value)
    return found[1].lower() if found else None


def _slug(value: str) -> str | None:
    """`Text Generation` as the Hub spells it: text-generation."""
    slug = re.sub(r"[\s_]+", "-", value.lower())
    return slug if re.fullmatch(r"[a-z0-9-]+", slug) else None


_SPELLING = {"language": _language, "pipeline_tag": _slug}
"""How the Hub wants a field spelled; licences are compared with the table of licences."""
