"""The engine's own noise: a task that the same model is scored on twice, the second time in other batches.

The rate is one of model and engine on that task, so it is measured once: later baselines, of other suites or with other
numbers of documents, use it again.
"""

from __future__ import annotations

from pathlib import Path

from fp8pipe.errors import EngineFailed
from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.records import FlipRate, MetricSamples, Record, TaskResult


class KnownRates(Record):
    """The rates of one task, one for each metric, and with which suite they were measured."""

    suite: str
    rates: tuple[FlipRate, ...]


def known_rates(request: EvalRequest, task: str) -> tuple[FlipRate, ...]:
    """What an earlier measurement of the same model and engine found for this task; nothing if there was none."""
    found = KnownRates.load_if_present(_path(request, task)) if request.rates is not None else None
    return tuple(rate.model_copy(update={"suite": found.suite}) for rate in found.rates) if found is not None else ()


def keep_rates(request: EvalRequest, task: str, rates: tuple[FlipRate, ...]) -> None:
    """Save the rates of a task for later measurements, if the request names a folder for them."""
    if request.rates is not None:
        KnownRates(suite=request.suite.name, rates=rates).save(_path(request, task))


def _path(request: EvalRequest, task: str) -> Path:
    assert request.rates is not None
    return Path(request.rates) / f"{request.rate_identity(task)[:32]}.json"


def flip_rates(once: TaskResult, again: TaskResult) -> tuple[FlipRate, ...]:
    """Per metric, how many samples changed their value. Raises EngineFailed if the runs scored different samples."""
    if (once.doc_ids, once.prompt_hashes) != (again.doc_ids, again.prompt_hashes):
        raise EngineFailed(f"{once.task}: the two runs scored different samples and cannot be compared")
    pairs = [(metric, again.samples_of(metric.metric, metric.filter)) for metric in once.metrics]
    return tuple(_rate(once.task, metric, other) for metric, other in pairs if other is not None)


def _rate(task: str, once: MetricSamples, again: MetricSamples) -> FlipRate:
    flipped = sum(one != other for one, other in zip(once.values, again.values, strict=True))
    return FlipRate(task=task, metric=once.metric, filter=once.filter, n=len(once.values), flipped=flipped)
