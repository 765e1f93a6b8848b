"""How much noise FP8 adds to one Linear: measured on some rows of its weight and some tokens of its input.

In: weights of a layer, what their inputs were, the recipe's schemes. Out: a `Sensitivity` for each. A sample is enough,
because noise is spread over a weight: a quarter of a million weights and 128 tokens give the SQNR to a tenth of a dB or
so, at a few percent of the layer's own cost. Rows and tokens are drawn by fixed seeds: equal runs give equal figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fp8pipe.calibrate.rounding import round_in_place, rounded_input, rounded_weight, shared_amax
from fp8pipe.config import ActivationScheme, WeightScheme
from fp8pipe.records.calibration import LayerSensitivity, Sensitivity

WEIGHTS = 1 << 18
"""About so many weights of a matrix are looked at, in whole rows."""
TOKENS = 128
"""About so many tokens of a Linear's input are looked at, from all samples."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight [out, in] of a layer, a view into its parameter."""

    names: tuple[str, ...]
    """Modules on disk that it belongs to; several where transformers stacks gate and up."""
    weight: Tensor
    group: str
    """Weights of one group share a per-tensor scale; empty: alone."""


@dataclass(frozen=True, slots=True)
class RowSample:
    """Some rows of a weight, before and after FP8."""

    rows: Tensor
    """float32 [n, in]."""
    rounded: Tensor
    saturated: float
    out_features: int


class TokenSample:
    """Some tokens of one input, gathered pass by pass."""

    def __init__(self, total: int, wanted: int = TOKENS) -> None:
        """total: tokens that will run, over all samples. wanted: about so many are gathered, at most twice as many."""
        self._total, self._wanted = total, wanted
        self._parts: list[Tensor] = []
        self._gathered = 0

    def add(self, values: Tensor) -> None:
        """values: [..., tokens, in]."""
        if self._gathered >= 2 * self._wanted:
            return
        flat = values.reshape(-1, values.shape[-1])
        share = math.ceil(self._wanted * len(flat) / self._total)
        part = flat[spread(len(flat), share, len(self._parts)).to(flat.device)]
        self._parts.append(part)
        self._gathered += len(part)

    def tokens(self) -> Tensor | None:
        """[n, in], None when nothing was seen."""
        return torch.cat(self._parts) if self._parts else None


@lru_cache(maxsize=4096)
def spread(count: int, share: int, seed: int) -> Tensor:
    """At most `share` of `count` places, drawn anew for each seed: a fixed place would always be the first token."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:share].sort().values


def sample_rows(
    matrices: Sequence[Matrix], scheme: WeightScheme, *, in_place: bool, weights: int = WEIGHTS
) -> list[RowSample]:
    """About `weights` weights of each matrix, rounded under the scales of the whole one.

    in_place: then the layer's own weights are rounded too, by exact scales; else a per-tensor mse range is estimated.
    """
    shared = _shared(matrices, scheme, exact=in_place, weights=weights) if scheme.strategy == "tensor" else {}
    samples = []
    for index, matrix in enumerate(matrices):
        amax = shared.get(index)
        before = matrix.weight[_places(matrix.weight, scheme, weights)].float()
        after, saturated = rounded_weight(before, scheme, amax)
        samples.append(RowSample(before, after, saturated, len(matrix.weight)))
        if in_place:
            round_in_place(matrix.weight, scheme, amax)
    return samples


def _shared(matrices: Sequence[Matrix], scheme: WeightScheme, *, exact: bool, weights: int) -> dict[int, Tensor]:
    """Index of a matrix -> the per-tensor range that it shares with its group."""
    groups: dict[str, list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault(matrix.group if scheme.share_scales and matrix.group else f"#{index}", []).append(index)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        whole = [matrices[i].weight for i in members]
        some = None if exact else [weight[_places(weight, scheme, weights)] for weight in whole]
        amax = shared_amax(whole, scheme, samples=some)
        found |= dict.fromkeys(members, amax)
    return found


def _places(weight: Tensor, scheme: WeightScheme, weights: int) -> Tensor:
    """Rows to look at; whole bands of blocks under strategy block."""
    rows = max(16, min(256, weights // weight.shape[1]))
    height = scheme.block_shape[0] if scheme.strategy == "block" else 1
    bands = spread(max(1, len(weight) // height), max(1, rows // height), 0)  # a lower band at the end is left out
    places = (bands[:, None] * height + torch.arange(height)).flatten()
    return places[places < len(weight)].to(weight.device)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the input of a Linear was."""

    tokens: Tensor | None
    """Some of them, [n, in]."""
    amax: float
    amax_to_cover: float
    """The range that a static scale covers."""
    saturated: float


def sensitivity_of(
    layer: str, sample: RowSample, seen: Seen, activations: ActivationScheme | None, *, group: int
) -> Sensitivity:
    """The figures of one matrix. group: columns per scale of dynamic activations per group."""
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
    """All Linears of a layer together: their energies and noises added up."""
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
    """10 log10(signal / noise); None when either is nothing."""
    return round(10 * math.log10(signal / noise), 3) if signal > 0 and noise > 0 else None


def shared_out(found: Mapping[tuple[str, ...], Sensitivity]) -> dict[str, Sensitivity]:
    """Names on disk -> figures; energies are split where one matrix has several names."""
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
