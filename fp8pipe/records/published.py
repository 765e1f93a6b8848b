"""What others publish about a source model."""

from __future__ import annotations

from fp8pipe.records.base import Record


class PublishedScore(Record):
    """One score of the source, as its repository gives it. Nobody checked it."""

    dataset: str
    """Hub id, or whatever stands there."""
    name: str
    metric: str
    """Empty where none is named."""
    value: float
    """As written: a share or a percentage."""
    where: str
    """card | .eval_results"""


class PublishedScores(Record):
    """All of them. `DIR/fp8pipe/published.json`."""

    scores: tuple[PublishedScore, ...]
