"""The card's front matter and licence, and what they inherit from the source's own card."""

from __future__ import annotations

import re
from typing import Any

import yaml

from fp8pipe.config import Recipe, is_local_data
from fp8pipe.hub.model_card import front_matter
from fp8pipe.model.untrusted import is_plain
from fp8pipe.release.card.facts import CardFacts

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Front matter that holds for a quantized copy too."""
MAX_FRONT_MATTER = 100_000
"""Characters of a card that are searched for front matter."""
MAX_VALUES = 1000
"""Entries of one list; there are 200 languages."""


def inherited_metadata(card: str | None) -> dict[str, Any]:
    """The front matter that a copy inherits from the source's README.md; empty if there is none, or it is not YAML."""
    start = (card or "")[:MAX_FRONT_MATTER].replace("\r\n", "\n")
    found = re.match(r"\A\ufeff?---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", start, re.DOTALL)
    if found is None:
        return {}
    try:
        content = yaml.safe_load(found.group(1))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}  # it is somebody else's card: what it does not say clearly is not repeated
    if not isinstance(content, dict):
        return {}
    return {key: content[key] for key in _INHERITED if _is_text(content.get(key))}


def _is_text(value: object) -> bool:
    """A text, or a list of texts, of a length that a person may have written."""
    listed = value if isinstance(value, list) else [value]
    return 0 < len(listed) <= MAX_VALUES and all(
        isinstance(item, str) and is_plain(item) and item.strip() for item in listed
    )


def card_front_matter(facts: CardFacts) -> str:
    """What the Hub indexes: base model, licence, tags, datasets, results."""
    calibration = facts.calibration
    on_hub = calibration is not None and not is_local_data(calibration.dataset)
    return front_matter(
        facts.repo_id.rsplit("/", 1)[-1],
        results=facts.decision.tasks,
        tags=("fp8", "vllm", *_format_tags(facts.recipe), "fp8pipe"),
        datasets=[calibration.dataset] if calibration is not None and on_hub else (),
        base_model=None if facts.source.is_local else facts.source.model_id,
        inherited=inherited_metadata(facts.source_card),
    )


def _format_tags(recipe: Recipe) -> tuple[str, ...]:
    width = "w8a16" if recipe.activations is None else "w8a8"
    return (width, "compressed-tensors") if recipe.checkpoint_format == "compressed-tensors" else (width,)


def licence_sentence(facts: CardFacts) -> str:
    """Which model this is a copy of, and under which licence."""
    known = inherited_metadata(facts.source_card)
    source = f"{facts.source.model_id} at {facts.source.commit}"
    if "license" not in known:
        return f"A copy of {source}, whose card names no licence: ask its owners before you use it."
    named = f" ({known['license_name']})" if "license_name" in known else ""
    link = f", {known['license_link']}" if "license_link" in known else ""
    return f"A copy of {source}, under that model's licence: {known['license']}{named}{link}."
