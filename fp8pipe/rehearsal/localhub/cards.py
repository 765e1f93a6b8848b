"""Reads and checks the front matter of a README. Pure.

Comes in: the text of a README.md. Goes out: its metadata and its body, or the errors and warnings about them.
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
    """The two parts of a README."""

    metadata: dict[str, Any] = field(default_factory=dict)
    """The front matter; {} if there is none or it does not parse."""
    body: str = ""
    """Markdown without the front matter."""


@dataclass(frozen=True, slots=True)
class CardCheck:
    """What the Hub's validate-yaml answers about a card."""

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def read_card(text: str) -> Card:
    """Metadata and body. A front matter that does not parse counts as none; `check_card` reports it."""
    match = FRONT_MATTER.match(text)
    if match is None:
        return Card({}, text)
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError:
        metadata = None
    return Card(metadata if isinstance(metadata, dict) else {}, text[match.end() :])


def check_card(text: str) -> CardCheck:
    """What is wrong with a card. An error refuses the commit; the client prints the warnings."""
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
    wrong_lists = [
        f'"{key}" must be a string or a list of strings' for key in TEXT_LISTS if not is_texts(metadata, key)
    ]
    return CardCheck(errors=(*wrong_texts, *wrong_lists))


def is_texts(metadata: dict[str, Any], key: str) -> bool:
    """Whether a value is missing, a string, or a list of strings."""
    value = metadata.get(key)
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


def text_list(metadata: dict[str, Any], key: str) -> list[str]:
    """The strings of a value that may be missing, one string, or a list."""
    value = metadata.get(key)
    return [str(v) for v in value] if isinstance(value, list) else [] if value is None else [str(value)]


def card_tags(metadata: dict[str, Any]) -> list[str]:
    """The tags that people can filter by: the card's own, and those that the Hub derives from other fields."""
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
