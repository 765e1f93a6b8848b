"""The card's front matter and licence, and what they inherit from the source's own card."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fp8pipe.config import Recipe, is_local_data
from fp8pipe.hub.model_card import front_matter
from fp8pipe.release.card.facts import CardFacts
from fp8pipe.release.card.published import DATASETS
from fp8pipe.release.licence import NOTICE_FILES


def card_front_matter(facts: CardFacts) -> str:
    """What the Hub indexes: base model, licence, tags, datasets, results."""
    calibration = facts.calibration
    on_hub = calibration is not None and not is_local_data(calibration.dataset)
    return front_matter(
        facts.repo_id.rsplit("/", 1)[-1],
        results=facts.decision.tasks,
        dataset_ids={name: dataset.id for name, dataset in DATASETS.items()},
        tags=("fp8", "vllm", *_format_tags(facts.recipe), "fp8pipe"),
        datasets=[calibration.dataset] if calibration is not None and on_hub else (),
        base_model=None if facts.source.is_local else facts.source.model_id,
        inherited=_licence_entries(facts) | _inherited(facts),
    )


def _inherited(facts: CardFacts) -> dict[str, Any]:
    """Languages and task of the source hold for a quantized copy too."""
    card = facts.source_card
    languages, task = card.texts.get("language", ()), card.one("pipeline_tag")
    known: dict[str, Any] = {"language": list(languages)} if languages else {}
    return known | ({"pipeline_tag": task} if task is not None else {})


def _licence_entries(facts: CardFacts) -> dict[str, str]:
    """`license`, and what the Hub asks for beside `other`: a name of small letters, and a link."""
    terms = facts.terms
    if terms.id is None or terms.licence is None:
        return {}
    if terms.licence.on_hub:
        return {"license": terms.id}
    entries = {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", terms.id.lower())}
    link = licence_link(facts)
    return entries | ({"license_link": link} if link is not None else {})


def licence_link(facts: CardFacts) -> str | None:
    """Where the text is: what the source's card says, if that is an address or a file that went along; else what the
    table of licences says, else such a file."""
    terms = facts.terms
    given = terms.link or ""
    if re.match(r"https?://", given) or given in facts.files:
        return given
    if terms.licence is not None and terms.licence.link:
        return terms.licence.link
    return next((name for name in facts.files if name.lower().startswith(("license", "licence"))), None)


def _format_tags(recipe: Recipe) -> tuple[str, ...]:
    width = "w8a16" if recipe.activations is None else "w8a8"
    return (width, "compressed-tensors") if recipe.checkpoint_format == "compressed-tensors" else (width,)


def licence_lines(facts: CardFacts) -> Iterator[str]:
    """Whose copy this is, what was changed, under which licence, and what that asks of users."""
    terms, source = facts.terms, f"{facts.source.model_id} at {facts.source.commit}"
    yield f"A copy of {source}, quantized to FP8: *.safetensors and config.json are changed, other files are not."
    if terms.licence is None:
        yield f"Its licence is not settled: {terms.problem}."
        return
    link = licence_link(facts)
    yield f"Under that model's licence: {terms.licence.title} ({terms.id}{f', {link}' if link else ''})."
    if terms.licence.terms:
        yield terms.licence.terms
    if terms.licence.notice:
        held = [name for name in NOTICE_FILES if name in facts.files]
        yield f"{terms.licence.notice.rstrip('.')}. {', '.join(held)} says so too."
    if terms.claim is not None:
        given = f"; its text, {terms.claim.file}, came from them" if terms.claim.file else ""
        yield f"The licence is what the publisher of this copy states{given}. On what ground: {terms.claim.reason}"
