"""Weights grouped by the range they share: a *unit* is a fused group under per-tensor scales, else a single weight."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fp8pipe.quantize.engine.views import Views, WeightView
from fp8pipe.quantize.kernels import Array
from fp8pipe.quantize.plan import OutputTensor, Plan


@dataclass(slots=True)
class Weight:
    """One weight: where it is read, where it and its scale are written, and its scale as far as it is known."""

    view: WeightView
    output: OutputTensor
    scale_output: OutputTensor
    scale: Array
    """float32; [1, 1] per tensor, [out, 1] per channel, [blocks, blocks]."""
    zeros: Array
    """bool, shape of `scale`: whether all weights under that scale are zero."""


@dataclass(slots=True)
class Unit:
    """Weights that share one range, or one weight with ranges of its own."""

    weights: list[Weight]
    amax: float | None = None
    """Per-tensor scales: the range, as the observer has chosen it."""
    measured: list[float] = field(default_factory=list)
    """Per-tensor scales: amax of each stripe."""
    errors: dict[tuple[str, int], Array] = field(default_factory=dict)
    """Per-tensor scales, mse observer: squared errors of each stripe, float64 [shrinks], by weight and first row."""

    @property
    def name(self) -> str:
        return self.weights[0].output.name

    @property
    def shards(self) -> set[str]:
        """Source files that it is read from."""
        return set().union(*(weight.view.shards for weight in self.weights))

    def stripes(self) -> list[tuple[Weight, int, int]]:
        """Every stripe of the unit as weight, first row, end."""
        return [(weight, *rows) for weight in self.weights for rows in weight.view.stripes(1)]


def units_of(plan: Plan, views: Views) -> list[Unit]:
    """All units, in the order of the checkpoint's bytes."""
    scheme = plan.settings.weights
    scales = {output.module: output for output in plan.outputs if output.role == "weight_scale"}
    units: dict[str, Unit] = {}
    for output in plan.outputs:
        if output.role != "weight":
            continue
        shape = _scale_shape(scales[output.module].shape, scheme.strategy)
        scale, zeros = np.empty(shape, np.float32), np.zeros(shape, np.bool_)
        weight = Weight(views.of(output), output, scales[output.module], scale, zeros)
        together = scheme.strategy == "tensor" and scheme.share_scales and output.group
        units.setdefault(output.group if together else output.name, Unit([])).weights.append(weight)
    return list(units.values())


def _scale_shape(on_disk: tuple[int, ...], strategy: str) -> tuple[int, ...]:
    return (1, 1) if strategy == "tensor" else on_disk


def zero_units(weight: Weight) -> list[str]:
    """Names of what holds only zeros: `tensor` itself, or its `tensor[row]` or `tensor[row, column]` of scales."""
    if not weight.zeros.any():
        return []
    if weight.zeros.all():
        return [weight.output.name]
    places = np.argwhere(weight.zeros).tolist()
    keep = 1 if weight.zeros.shape[-1] == 1 else 2
    return [f"{weight.output.name}[{', '.join(map(str, place[:keep]))}]" for place in places]
