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
    faint: Array
    """bool, shape of `scale`: whether all codes under that scale are zero, although a weight is not."""
    amax: float = 0.0
    """Per-tensor scales: its own largest magnitude, as far as it is measured."""


@dataclass(slots=True)
class Unit:
    """Weights that share one range, or one weight with ranges of its own."""

    weights: list[Weight]
    is_alone: bool
    """Whether vLLM takes its scales as they are, and not the largest of those of a fused group."""
    amax: float | None = None
    """Per-tensor scales: the range, as the observer has chosen it."""
    measured: list[tuple[str, float]] = field(default_factory=list)
    """Per-tensor scales: weight and amax of each stripe."""
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
        scale, zeros, faint = np.empty(shape, np.float32), np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        weight = Weight(views.of(output), output, scales[output.module], scale, zeros, faint)
        joined = scheme.strategy == "tensor" and output.group != ""
        name = output.group if joined and scheme.share_scales else output.name
        units.setdefault(name, Unit([], is_alone=scheme.share_scales or not joined)).weights.append(weight)
    return list(units.values())


def _scale_shape(on_disk: tuple[int, ...], strategy: str) -> tuple[int, ...]:
    return (1, 1) if strategy == "tensor" else on_disk


def names_of(flags: Array, name: str) -> list[str]:
    """Names of the flagged units of tensor `name`: itself, or its `name[row]` or `name[row, column]` of scales."""
    if not flags.any():
        return []
    if flags.all():
        return [name]
    places = np.argwhere(flags).tolist()
    keep = 1 if flags.shape[-1] == 1 else 2
    return [f"{name}[{', '.join(map(str, place[:keep]))}]" for place in places]
