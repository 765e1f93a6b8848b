"""How a long stage tells what it is doing: one event type, one callable, no global state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One step of one stage."""

    stage: str
    """The stage's name: source, calibrate, quantize, validate, evaluate, publish, ..."""
    done: float
    """How much is done, in `unit`."""
    total: float | None
    """How much there is, in `unit`; None while unknown."""
    unit: str = ""
    """"B" for bytes, else a plural noun: tensors, layers, samples, files."""
    note: str = ""
    """What is in hand, in a few words."""


Progress = Callable[[ProgressEvent], None]


def quiet(event: ProgressEvent) -> None:
    """The listener of those who do not listen."""
