"""The card's front matter and licence, and what they inherit from the source's own card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from fp8pipe.config import Recipe, is_local_data
from fp8pipe.hub.model_card import front_matter
from fp8pipe.hub.source_card import SourceCard
from fp8pipe.records import Snapshot, TaskDecision, Terms
from fp8pipe.release.card.facts import CardFacts
from fp8pipe.release.card.published import DATASETS
from fp8pipe.release.licence import NOTICE_FILES


def card_front_matter(facts: CardFacts) -> str:
    """What the Hub indexes: base model, licence, tags, datasets, results."""
    dataset = facts.calibration.dataset if facts.calibration is not None else None
    return expected_front_matter(
        facts.repo_id,
        facts.source,
        facts.recipe,
        source_card=facts.source_card,
        terms=facts.terms,
        files=facts.files,
        dataset=dataset,
        results=facts.decision.tasks,
    )


def expected_front_matter(
    repo_id: str,
    source: Snapshot,
    recipe: Recipe,
    *,
    source_card: SourceCard,
    terms: Terms,
    files: Sequence[str],
    dataset: str | None,
    results: Sequence[TaskDecision] = (),
) -> str:
    """The same before there are results. files: names of those beside the weights; dataset: that of the calibration."""
    return front_matter(
        repo_id.rsplit("/", 1)[-1],
        results=results,
        dataset_ids={name: known.id for name, known in DATASETS.items()},
        tags=("fp8", "vllm", *_format_tags(recipe), "fp8pipe"),
        datasets=[dataset] if dataset is not None and not is_local_data(dataset) else (),
        base_model=None if source.is_local else source.model_id,
        inherited=_licence_entries(terms, files) | _inherited(source_card),
    )


def _inherited(card: SourceCard) -> dict[str, Any]:
    """Languages and task of the source hold for a quantized copy too."""
    languages, task = card.texts.get("language", ()), card.one("pipeline_tag")
    known: dict[str, Any] = {"language": list(languages)} if languages else {}
    return known | ({"pipeline_tag": task} if task is not None else {})


def _licence_entries(terms: Terms, files: Sequence[str]) -> dict[str, str]:
    """`license`, and what the Hub asks for beside `other`: a name of small letters, and a link."""
    if terms.id is None or terms.licence is None:
        return {}
    if terms.licence.on_hub:
        return {"license": terms.id}
    entries = {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", terms.id.lower())}
    link = licence_link(terms, files)
    return entries | ({"license_link": link} if link is not None else {})


def licence_link(terms: Terms, files: Sequence[str]) -> str | None:
    """Where the text is: what the source's card says, if that is an address or a file that went along; else what the
    table of licences says, else such a file."""
    given = terms.link or ""
    if re.match(r"https?://", given) or given in files:
        return given
    if terms.licence is not None and terms.licence.link:
        return terms.licence.link
    return next((name for name in files if name.lower().startswith(("license", "licence"))), None)


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
    link = licence_link(terms, facts.files)
    yield f"Under that model's licence: {terms.licence.title} ({terms.id}{f', {link}' if link else ''})."
    if terms.licence.terms:
        yield terms.licence.terms
    if terms.licence.notice:
        held = [name for name in NOTICE_FILES if name in facts.files]
        yield f"{terms.licence.notice.rstrip('.')}. {', '.join(held)} says so too."
    if terms.claim is not None:
        given = f"; its text, {terms.claim.file}, came from them" if terms.claim.file else ""
        yield f"The licence is what the publisher of this copy states{given}. On what ground: {terms.claim.reason}"
