"""The work of a run, in pieces that start as soon as their source shards have arrived."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fp8pipe.quantize.engine.context import Context
from fp8pipe.quantize.engine.kept import KeptTensors
from fp8pipe.quantize.engine.pool import Task
from fp8pipe.quantize.engine.units import units_of
from fp8pipe.quantize.engine.views import Views
from fp8pipe.quantize.engine.weights import QuantizedWeights
from fp8pipe.quantize.plan import Plan


class Work:
    """Everything that the plan still has to write."""

    def __init__(self, plan: Plan, context: Context) -> None:
        self._context = context
        self._waiting = list(_pieces(plan, context))

    def release(self, available: set[str]) -> None:
        """Queue the pieces that need no source shard but the `available` ones."""
        ready = [start for needs, start in self._waiting if needs <= available]
        self._waiting = [(needs, start) for needs, start in self._waiting if not needs <= available]
        self._context.pool.add(ready)


def _pieces(plan: Plan, context: Context) -> Iterator[tuple[set[str], Task]]:
    """Units and kept tensors that are not finished: the source shards that each needs, and what starts it."""
    views, kept = Views(plan), KeptTensors(context)
    quantized = QuantizedWeights(context, plan.settings.weights)
    for unit in units_of(plan, views):
        if not all(context.is_finished(weight.output) for weight in unit.weights):
            yield unit.shards, partial(quantized.quantize, unit)
    for output in plan.outputs:
        if context.is_finished(output):
            continue
        if output.role == "copy":
            info = views.sources[output.source]
            yield {info.shard}, partial(kept.copy, info, output)
        elif output.role == "dequantize":
            view = views.of(output)
            yield view.shards, partial(kept.dequantize, view, output)
