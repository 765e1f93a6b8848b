"""One line of the check."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Row:
    """What was found, and whether it is as it should be."""

    name: str
    found: str
    limit: str = ""
    """What is asked for; empty for a figure that nothing is asked of."""
    passed: bool | None = None
    value: float | None = None
    """The figure as a number, for the JSON."""


def seconds(work: Callable[[], object], device: torch.device, *, repeat: int = 3) -> float:
    """The least of `repeat` durations, after a first run that does not count."""
    work()
    found = []
    for _ in range(repeat):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_row(name: str, device: torch.device) -> list[Row]:
    """The most memory that torch has held on the device since the last call; nothing for a CPU."""
    if device.type != "cuda":
        return []
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return [Row(f"{name}: peak GPU memory", f"{peak / 1e9:.2f} GB", value=peak)]
