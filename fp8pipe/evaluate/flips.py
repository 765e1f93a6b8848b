"""The engine's own noise: a task that the same model is scored on twice, the second time in other batches."""

from __future__ import annotations

from fp8pipe.errors import EngineFailed
from fp8pipe.records import FlipRate, MetricSamples, TaskResult


def flip_rates(once: TaskResult, again: TaskResult) -> tuple[FlipRate, ...]:
    """Per metric, how many samples changed their value. Raises EngineFailed if the runs scored different samples."""
    if (once.doc_ids, once.prompt_hashes) != (again.doc_ids, again.prompt_hashes):
        raise EngineFailed(f"{once.task}: the two runs scored different samples and cannot be compared")
    pairs = [(metric, again.samples_of(metric.metric, metric.filter)) for metric in once.metrics]
    return tuple(_rate(once.task, metric, other) for metric, other in pairs if other is not None)


def _rate(task: str, once: MetricSamples, again: MetricSamples) -> FlipRate:
    flipped = sum(one != other for one, other in zip(once.values, again.values, strict=True))
    return FlipRate(task=task, metric=once.metric, filter=once.filter, n=len(once.values), flipped=flipped)
