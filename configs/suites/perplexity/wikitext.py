"""How a WikiText page is read and scored: lm-eval's own functions for `wikitext`, and nats per word beside them."""

from __future__ import annotations

from typing import Any

from lm_eval.tasks.wikitext import preprocess_wikitext

Doc = dict[str, Any]  # Any: a row of a dataset


def text(doc: Doc) -> str:
    """The page as running text."""
    return preprocess_wikitext.wikitext_detokenizer(doc)


def process_results(doc: Doc, results: tuple[float]) -> dict[str, Any]:  # Any: sums with their units
    """Per document: what lm-eval reports for `wikitext`, and nll = -log likelihood / words of the page."""
    scored = preprocess_wikitext.process_results(doc, results)
    log_likelihood, words = scored["word_perplexity"]
    return scored | {"nll": -log_likelihood / words}
