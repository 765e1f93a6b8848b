"""How much noise FP8 adds to one Linear, measured on samples of its weight and of its input.

In: some rows of a weight, some tokens of its input, the recipe's schemes. Out: a `Sensitivity`. A sample is enough,
because the noise is spread over the whole weight: a quarter of a million weights and 128 tokens give the SQNR to about
a tenth of a dB, at a few percent of the layer's own cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fp8pipe.calibrate.sensitivity.rounding import rounded_input
from fp8pipe.calibrate.sensitivity.sampling import RowSample, Seen
from fp8pipe.config import ActivationScheme
from fp8pipe.records.calibration import LayerSensitivity, Sensitivity


def sensitivity_of(
    layer: str, sample: RowSample, seen: Seen, activations: ActivationScheme | None, *, group: int
) -> Sensitivity:
    """The figures of one matrix. group: columns that share a scale of dynamic activations with strategy group."""
    scale_up = sample.out_features / len(sample.rows)
    inputs = sample.rows.new_zeros(0, sample.rows.shape[1]) if seen.tokens is None else seen.tokens.float()
    outputs = inputs @ sample.rows.T
    rounded = rounded_input(inputs, activations, seen.amax_to_cover, group=group) @ sample.rounded.T
    return Sensitivity(
        layer=layer,
        weight_sqnr_db=sqnr_db(_energy(sample.rows), _energy(sample.rounded - sample.rows)),
        output_sqnr_db=sqnr_db(_energy(outputs), _energy(rounded - outputs)),
        weight_energy=_short(_energy(sample.rows) * scale_up),
        output_energy=_short(_energy(outputs) * scale_up / max(1, len(inputs))),
        weight_saturation=_short(sample.saturated),
        input_saturation=_short(seen.saturated),
        weight_kurtosis=_kurtosis(sample.rows),
        input_kurtosis=_kurtosis(inputs),
        input_amax=seen.amax,
    )


def of_layer(sensitivities: Iterable[Sensitivity]) -> LayerSensitivity:
    """All Linears of a layer taken together: their energies and noises added up."""
    found = list(sensitivities)
    return LayerSensitivity(
        weight_sqnr_db=together((one.weight_energy, one.weight_sqnr_db) for one in found),
        output_sqnr_db=together((one.output_energy, one.output_sqnr_db) for one in found),
    )


def together(parts: Iterable[tuple[float, float | None]]) -> float | None:
    """SQNR in dB of several signals side by side, from the energy and SQNR of each."""
    known = list(parts)
    noise = sum(energy / 10 ** (db / 10) for energy, db in known if db is not None)
    return sqnr_db(sum(energy for energy, _ in known), noise)


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None when either is 0."""
    return round(10 * math.log10(signal / noise), 3) if signal > 0 and noise > 0 else None


def shared_out(found: Mapping[tuple[str, ...], Sensitivity]) -> dict[str, Sensitivity]:
    """Name on disk -> figures. Where one matrix has several names, each gets an equal part of the energies."""
    return {
        name: one.model_copy(
            update={
                "weight_energy": one.weight_energy / len(names),
                "output_energy": one.output_energy / len(names),
            }
        )
        for names, one in found.items()
        for name in names
    }


def _energy(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def _kurtosis(values: Tensor) -> float:
    energy = _energy(values)
    return _short(_energy(values.square()) * values.numel() / energy**2) if energy else 0.0


def _short(value: float) -> float:
    return float(f"{value:.6g}")
