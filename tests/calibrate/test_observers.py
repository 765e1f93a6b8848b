"""Observers: minmax, percentile and mse find the range that they promise."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.calibrate.observers import observer_for


def test_minmax_is_the_running_maximum_in_any_order() -> None:
    batches = torch.randn(6, 2, 50)
    forwards, backwards = observer_for("minmax", 2), observer_for("minmax", 2)
    for batch in batches:
        forwards.update(batch)
    for batch in reversed(batches):
        backwards.update(batch)
    assert forwards.ranges() == backwards.ranges() == tuple(batches.abs().amax((0, 2)).tolist())


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.9, 100.0])
def test_percentile_of_bf16_values_is_exact(percentile: float) -> None:
    values = torch.randn(3, 4000).to(torch.bfloat16)
    observer = observer_for("percentile", 3, percentile)
    for part in values.split(500, dim=1):
        observer.update(part)
    ordered = values.abs().float().sort(dim=1).values
    assert observer.ranges() == tuple(ordered[:, round(percentile * 40) - 1].tolist())


def test_mse_range_has_the_smallest_error_of_all_candidates() -> None:
    values = torch.randn(20000).to(torch.bfloat16)
    values[0] = 700.0  # an outlier: keeping it in range costs E4M3 little relative precision
    observer = observer_for("mse", 1)
    observer.update(values)
    wide = values.double()

    def error(amax: float) -> float:
        scale = amax / 448
        codes = (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return (codes.double() * scale - wide).square().sum().item()

    (found,) = observer.ranges()
    assert error(found) <= min(error(700.0 * share / 100) for share in range(20, 101)) * (1 + 1e-6)


def test_clipped_share_is_exact_for_a_percentile() -> None:
    observer = observer_for("percentile", 1, 90.0)
    values = torch.arange(1, 201).to(torch.bfloat16)  # bf16 holds these exactly
    observer.update(values)
    (limit,) = observer.ranges()
    assert observer.saturation() == pytest.approx(float((values.float() > limit).float().mean()))
    assert observer_for("minmax", 1).saturation() == 0
