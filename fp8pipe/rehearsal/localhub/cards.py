"""The front matter of a README: reading it, and finding what is wrong with it. Pure.

Comes in: the text of a README.md. Goes out: its metadata and its body; or messages, empty when there is nothing to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n)?^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
TEXTS = ("library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation", "pretty_name")
TEXT_LISTS = ("tags", "base_model", "datasets", "metrics", "license", "language")


@dataclass(frozen=True, slots=True)
class Card:
    """A README taken apart."""

    metadata: dict[str, Any] = field(default_factory=dict)
    """What the front matter says, {} without one or with a broken one."""
    body: str = ""
    """Markdown without the front matter."""


@dataclass(frozen=True, slots=True)
class CardCheck:
    """What the Hub's validate-yaml says about a card."""

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def read_card(text: str) -> Card:
    """Metadata and body. A front matter that does not parse counts as none: it is `check_card` that complains."""
    match = FRONT_MATTER.match(text)
    if match is None:
        return Card({}, text)
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError:
        metadata = None
    return Card(metadata if isinstance(metadata, dict) else {}, text[match.end() :])


def check_card(text: str) -> CardCheck:
    """Errors refuse a commit, warnings are shown by the client."""
    match = FRONT_MATTER.match(text)
    if match is None:
        return CardCheck(warnings=("empty or missing yaml metadata in repo card",))
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return CardCheck(errors=(f"YAML: {error}",))
    if metadata is None:
        return CardCheck(warnings=("empty or missing yaml metadata in repo card",))
    if not isinstance(metadata, dict):
        return CardCheck(errors=('"metadata" must be of type object',))
    wrong_texts = [f'"{key}" must be a string' for key in TEXTS if not isinstance(metadata.get(key, ""), str)]
    wrong_lists = [f'"{key}" must be a string or a list of strings' for key in TEXT_LISTS if not texts(metadata, key)]
    return CardCheck(errors=(*wrong_texts, *wrong_lists))


def texts(metadata: dict[str, Any], key: str) -> bool:
    """Whether a value is absent, a text, or a list of texts."""
    value = metadata.get(key)
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


def text_list(metadata: dict[str, Any], key: str) -> list[str]:
    """A value that may be one text, several, or none, as a list."""
    value = metadata.get(key)
    return [str(v) for v in value] if isinstance(value, list) else [] if value is None else [str(value)]


def card_tags(metadata: dict[str, Any]) -> list[str]:
    """The tags by which the Hub lets people filter: the card's own and those it derives."""
    relation = metadata.get("base_model_relation")
    bases = text_list(metadata, "base_model")
    derived = [
        *text_list(metadata, "library_name"),
        *text_list(metadata, "pipeline_tag"),
        *text_list(metadata, "language"),
        *(f"dataset:{name}" for name in text_list(metadata, "datasets")),
        *(f"base_model:{base}" for base in bases),
        *(f"base_model:{relation}:{base}" for base in bases if relation),
        *(f"license:{name}" for name in text_list(metadata, "license")),
    ]
    return list(dict.fromkeys([*text_list(metadata, "tags"), *derived]))
