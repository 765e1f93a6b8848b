"""A layer is observed while its watch is entered, and not longer."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn

from fp8pipe.calibrate.hooks import LayerWatch
from fp8pipe.calibrate.targets import LayerModules, Schemes
from fp8pipe.config import ActivationScheme, WeightScheme


def observed(module: nn.Module, experts: Sequence[Any] = ()) -> LayerWatch:
    schemes = Schemes(WeightScheme(strategy="tensor"), ActivationScheme(mode="static", strategy="tensor"), None)
    return LayerWatch(schemes, LayerModules("layer", {"linear": module}, experts=experts), tokens=4)  # type: ignore[dict-item]


def test_inputs_are_observed_only_while_the_watch_is_entered() -> None:
    linear = nn.Linear(8, 8).requires_grad_(False)
    watch = observed(linear)
    linear(torch.full((1, 4, 8), 9.0))
    with watch:
        linear(torch.full((1, 4, 8), -2.0))
    linear(torch.full((1, 4, 8), 9.0))
    assert watch.ranges().inputs == {"linear": 2.0}


class _Unobservable(nn.Module):
    """Experts without a config, so that the watch cannot be entered."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(2, 8, 8), requires_grad=False)
        self.is_transposed = False

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        return hidden


@pytest.mark.parametrize("breaks", ["the weights are sampled", "the experts are entered"])
def test_a_watch_that_fails_to_begin_leaves_nothing_behind(breaks: str) -> None:
    linear = nn.Linear(8, 8).requires_grad_(False)
    weight = linear.weight
    if breaks == "the weights are sampled":
        linear.weight = nn.Parameter(torch.ones(8, 8, device="meta"), requires_grad=False)
        watch = observed(linear)
    else:
        watch = observed(linear, [(_Unobservable(), {("gate_up_proj", 0): ["up"]})])
    with pytest.raises((NotImplementedError, RuntimeError, AttributeError)), watch:
        raise AssertionError("it began")
    linear.weight = weight
    linear(torch.ones(1, 4, 8))
    assert watch.ranges().inputs == {}
    left = ref(watch)
    del watch
    gc.collect()
    assert left() is None
