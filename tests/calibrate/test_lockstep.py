"""Lockstep: all passes advance together, one layer at a time, and compute what the model computes."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from fp8pipe.calibrate.lockstep import Lockstep
from fp8pipe.errors import UnsupportedArchitecture


class _Twice(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 2


def test_lockstep_computes_what_the_model_computes_and_restores_the_layers() -> None:
    layers = {"a": _Twice(), "b": _Twice()}
    results: dict[int, float] = {}

    def forward(index: int) -> None:
        hidden = torch.tensor(float(index))
        for layer in layers.values():
            hidden = layer(hidden) + 1
        results[index] = hidden.item()

    order = []
    with Lockstep(layers, [lambda index=index: forward(index) for index in range(3)]) as steps:
        for step in steps:
            for one in step.passes:
                order.append(step.layer)
                one.proceed(step.compute(one))
    assert order == ["a"] * 3 + ["b"] * 3
    assert results == {index: (index * 2 + 1) * 2 + 1 for index in range(3)}
    assert layers["a"](torch.tensor(1.0)).item() == 2


def test_a_model_that_reads_its_embeddings_after_the_last_layer_computes_the_same() -> None:
    embedding, layer = nn.Embedding(10, 4), _Twice()
    samples = [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])]
    results: dict[int, torch.Tensor] = {}

    def forward(index: int) -> None:
        embeddings = embedding(samples[index])
        results[index] = layer(embeddings) + embeddings

    with torch.inference_mode():
        expected = [3 * embedding(ids) for ids in samples]
    with Lockstep({"layer": layer}, [lambda index=index: forward(index) for index in range(2)]) as steps:
        for step in steps:
            for one in step.passes:
                one.proceed(step.compute(one))
    assert all(torch.equal(results[index], expected[index]) for index in range(2))


def test_an_error_in_one_pass_is_raised_and_ends_all_others() -> None:
    layer = _Twice()

    def forward(index: int) -> None:
        hidden = layer(torch.tensor(float(index)))
        if index == 1:
            raise ZeroDivisionError("between two layers")
        layer(hidden)

    before = threading.active_count()
    with (
        pytest.raises(ZeroDivisionError, match="between two layers"),
        Lockstep({"layer": layer}, [lambda index=index: forward(index) for index in range(3)]) as steps,
    ):
        for step in steps:
            for one in step.passes:
                one.proceed(step.compute(one))
    assert threading.active_count() == before
    assert layer(torch.tensor(1.0)).item() == 2


def test_passes_that_take_different_layers_are_refused() -> None:
    layers = {"a": _Twice(), "b": _Twice()}
    forwards = [lambda name=name: layers[name](torch.tensor(1.0)) for name in layers]
    with pytest.raises(UnsupportedArchitecture, match="order of layers"), Lockstep(layers, forwards) as steps:
        next(iter(steps))
