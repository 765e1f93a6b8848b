"""Samples of a layer: some rows of each weight, before and after FP8, and some tokens of each input.

Rows and tokens are drawn with fixed seeds: equal runs give equal figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fp8pipe.calibrate.observers import Observer
from fp8pipe.calibrate.sensitivity.rounding import round_in_place, rounded_weight, shared_amax
from fp8pipe.config import WeightScheme

WEIGHTS = 1 << 18
"""About how many weights of a matrix are sampled, in whole rows."""
TOKENS = 128
"""About how many tokens of a Linear's input are sampled, over all samples."""


@lru_cache(maxsize=4096)
def spread(count: int, share: int, seed: int) -> Tensor:
    """At most `share` of `count` indices, sorted, other ones for each seed: fixed ones would always be first tokens."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:share].sort().values


# ---------------------------------------------------------------------------------------------- rows of weights


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight [out, in] of a layer, a view into its parameter."""

    names: tuple[str, ...]
    """Its modules on disk; several where transformers stacks gate and up."""
    weight: Tensor
    group: str
    """Weights of one group share a per-tensor scale; empty: a scale of its own."""


@dataclass(frozen=True, slots=True)
class RowSample:
    """Some rows of a weight, before and after FP8."""

    rows: Tensor
    """float32 [n, in]."""
    rounded: Tensor
    saturated: float
    """Share of the rows' weights that was clamped."""
    out_features: int


def sample_rows(
    matrices: Sequence[Matrix], scheme: WeightScheme, *, in_place: bool, weights: int = WEIGHTS
) -> list[RowSample]:
    """About `weights` weights of each matrix, rounded with the scales of the whole matrix.

    in_place: also round the layer's own weights, with exact scales; otherwise the mse range per tensor is an estimate.
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
    """Indices of the sampled rows; whole bands of blocks under strategy block."""
    rows = max(16, min(256, weights // weight.shape[1]))
    height = scheme.block_shape[0] if scheme.strategy == "block" else 1
    bands = spread(max(1, len(weight) // height), max(1, rows // height), 0)  # never a last band of fewer rows
    places = (bands[:, None] * height + torch.arange(height)).flatten()
    return places[places < len(weight)].to(weight.device)


# ---------------------------------------------------------------------------------------------- tokens of inputs


class TokenSample:
    """Some tokens of one input, gathered pass by pass."""

    def __init__(self, total: int, wanted: int = TOKENS) -> None:
        """total: tokens that will run, over all samples. wanted: about how many are gathered, at most twice as many."""
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
        """[n, in]; None when nothing was added."""
        return torch.cat(self._parts) if self._parts else None


@dataclass(frozen=True, slots=True)
class Seen:
    """What the input of a Linear was."""

    tokens: Tensor | None
    """Some of its tokens, [n, in]."""
    amax: float
    amax_to_cover: float
    """The range that a static scale covers."""
    saturated: float
    """Share of the values beyond that range."""


class WatchedInput:
    """The input of one quantized Linear over all samples: its range, and some of its tokens."""

    def __init__(self, observer: Observer, sample: TokenSample) -> None:
        self.observer = observer
        self._sample = sample
        self.tokens = 0
        """Number of tokens that it has seen."""

    def saw(self, values: Tensor) -> None:
        """values: [..., tokens, in]."""
        self.observer.update(values)
        self.tokens += values.numel() // values.shape[-1]
        self._sample.add(values)

    def seen(self) -> Seen:
        """What there was to see."""
        (amax,), (cover,) = self.observer.amax(), self.observer.ranges()
        return Seen(self._sample.tokens(), amax, cover, self.observer.saturation())
