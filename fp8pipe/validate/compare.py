"""One quantized weight beside its source, tile by tile: how far each code, row and scale is from what it should be.

In: codes, source values and scales of the same rows, handed over by `measure.py`. Out: a `Comparison` of counts and
first places; `fidelity.py` judges it.

Nearly every code is the one that rounding to nearest gives, which one vectorised cast tells. Only the others are held
against the exact rule of D1, in float64. The cast here is torch's own and not the engine's, so that a mistake of the
engine is not repeated by its judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fp8pipe.model.headers import TensorInfo
from fp8pipe.validate.scheme import E4M3, FP8, Spec
from fp8pipe.validate.units import (
    HALF_UNIT,
    Array,
    amax_of,
    half_values,
    is_coarse,
    magnitudes,
    nearest,
    ordinal,
    spread,
    step,
    unit_counts,
    unit_rows,
    unit_tops,
    values,
)

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TILE = 1 << 20
"""Weights in hand at a time: with fewer Python's share of the time grows."""
PANEL = 1 << 18
"""Of them, what torch works on at a time: more leave a core's cache."""
KEPT_UNITS = 1
"""Ranges are kept where a weight has one, since fused siblings may share it."""


@dataclass(slots=True)
class Share:
    """How many units of a weight something holds for."""

    count: int = 0
    first: int = -1
    """Number of the first unit."""
    value: float = 0.0
    wanted: float = 0.0

    def note(self, flags: torch.Tensor, begin: int, value: torch.Tensor, wanted: torch.Tensor) -> None:
        """Count the units that are flagged; `begin` is the number of the first of them all."""
        found = int(flags.sum())
        if found and self.count == 0:
            at = int(torch.nonzero(flags.reshape(-1))[0])
            self.first, self.value, self.wanted = begin + at, float(value.flatten()[at]), float(wanted.flatten()[at])
        self.count += found


def is_compiled(spec: Spec) -> bool:
    """Whether there is a compiled loop for these codes; all others are compared in torch, which needs several."""
    return spec.format.codes is E4M3


class Comparison:
    """One quantized weight beside its source, filled tile by tile."""

    def __init__(self, entry: TensorInfo, source_dtype: str, spec: Spec, shape: tuple[int, int]) -> None:
        self.entry = entry
        self.spec = spec
        self.shape = shape
        """[out, in]"""
        self._dtype = source_dtype
        grid = spec.units(shape)
        self.units = math.prod(grid)
        keeps = spec.strategy != "group"
        self._ranges = torch.zeros(grid) if keeps else None
        """Largest source magnitude per unit; of groups none is kept."""
        self._clipped: torch.Tensor | None = None
        self._held: dict[str, torch.Tensor] = {}
        self.amax = 0.0
        """Of the whole weight."""
        self.most_clipped = 0
        """Source weights beyond the codes' reach, in the unit with the most of them."""
        self.worst_unit = 0
        self.unequal = 0
        """Codes that are not, bit for bit, what rounding gives."""
        self.off = 0
        """Codes that break D1."""
        self.first_off: tuple[list[int], float, float] | None = None
        """Index, source / scale, and the code's value, of the first of them."""
        self.not_nearest = 0
        self.far = 0
        """Codes more than one step from the nearest."""
        self.zero_codes = 0
        self.zero_source = 0
        self.error_sq = 0.0
        self.source_sq = 0.0
        self.worst_cosine = 1.0
        self.worst_row = 0
        self.bad_ratio = Share()
        """Units whose scale * maximum is too far from their largest weight."""
        self.inexact: dict[Arithmetic, Share] = {}
        """By arithmetic: units whose scale is not exactly absmax / 448 in it."""
        self.foreign_scales = 0
        """Units whose scale this engine would not have chosen, whatever its observer."""

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def rel_l2(self) -> float:
        """Norm of the quantization error over the norm of the source."""
        return math.sqrt(self.error_sq / self.source_sq) if self.source_sq else 0.0

    @property
    def unit_size(self) -> int:
        """Weights that share a scale (at the edges of a block grid: at most)."""
        rows, columns = self.shape
        if self.spec.block is not None:
            return min(rows, self.spec.block[0]) * min(columns, self.spec.block[1])
        return columns if self.spec.strategy == "channel" else rows * columns

    # ------------------------------------------------------------------------------------------ filling

    def add(self, row: int, codes: torch.Tensor, source: Array, scale: torch.Tensor) -> None:
        """Whole rows from `row` on: codes uint8 [rows, columns], the source's bytes, float32 scales of their units."""
        weight = torch.from_numpy(source).view(KINDS[self._dtype]).view(codes.shape)
        add = self._add_compiled if is_compiled(self.spec) else self._add_in_torch
        self._note_rows(row, add(row, codes, weight, scale))

    def _add_compiled(self, row: int, codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """In one pass; returns squared norms of source, restored weight and error, per row: float64 [3, rows]."""
        from fp8pipe.validate.kernels import compare  # numba takes a second to import

        rows, columns = codes.shape
        grid = scale.view(-1, scale.shape[-1])
        high, wide = self.spec.block or (1 if self.spec.strategy == "channel" else rows, columns)
        tops, clipped = torch.zeros(grid.shape), torch.zeros(grid.shape, dtype=torch.int64)
        sums = torch.empty(3, rows, dtype=torch.float64)
        differs = self._buffer("differs", torch.int32, codes.shape).view(-1)
        bits = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight.float().view(torch.uint32)
        unequal, zero_codes, zero_source = compare(
            *(bits.numpy(), codes.numpy(), grid.numpy(), high, wide),
            *(tops.view(torch.int32).numpy(), clipped.numpy(), sums.numpy(), differs.numpy()),
        )
        self.zero_codes += zero_codes
        self.zero_source += zero_source
        self._note_units(row, rows, tops.view(scale.shape), scale)
        if self._clipped is not None:
            self._clipped[unit_rows(self.spec, row, rows)] += clipped.view(scale.shape)
        if unequal:
            at = differs[:unequal].long()
            scaled = weight.reshape(-1)[at].float() / grid[at // columns // high, at % columns // wide]
            wanted = nearest(scaled, self.spec.format.codes, may_clip=True)
            self._judge(row, 0, columns, at, scaled, codes.reshape(-1)[at], wanted)
        return sums

    def _add_in_torch(self, row: int, codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """In panels of columns that fit a core's cache; returns what `_add_compiled` does."""
        rows, columns = codes.shape
        bits = magnitudes(weight.view(torch.uint8).view(-1).numpy(), self._dtype).view(rows, columns)
        amax = amax_of(unit_tops(bits, self.spec), self._dtype)
        self._note_units(row, rows, amax, scale)
        sign = 8 if self.spec.format.codes.per_byte == 2 else 0x80
        self.zero_codes += codes.numel() - int(np.count_nonzero(codes.numpy() & (sign - 1)))
        self.zero_source += bits.numel() - int(np.count_nonzero(bits.numpy()))
        is_clipped = bool((amax > scale * self.spec.format.codes.maximum).any())
        sums = torch.zeros(3, rows, dtype=torch.float64)
        for left, right, units in self._panels(rows, columns, scale):
            sums += self._add_panel(row, left, weight[:, left:right], codes[:, left:right], units, is_clipped)
        return sums

    def _panels(self, rows: int, columns: int, scale: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(left, right, scales) of columns that fit a core's cache, in whole blocks or within the last, narrower one.
        Scales per row have one panel."""
        if self.spec.block is None:
            yield 0, columns, scale
            return
        wide = self.spec.block[1]
        count = max(1, PANEL // (rows * wide))
        whole = columns // wide
        for block in range(0, whole, count):
            last = min(block + count, whole)
            yield block * wide, last * wide, scale[:, block:last]
        if whole < scale.shape[1]:
            yield whole * wide, columns, scale[:, whole:]

    def _add_panel(
        self, row: int, left: int, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, is_clipped: bool
    ) -> torch.Tensor:
        """Judge the codes; returns squared norms of source, restored weight and error, per row: float64 [3, rows]."""
        kind = self.spec.format.codes
        rows, columns = weight.shape
        multiplier, shape = spread(scale, self.spec, rows, columns)
        scaled = self._buffer("scaled", torch.float32, weight.shape).copy_(weight)
        scaled.view(shape).div_(multiplier)
        if is_clipped and self._clipped is not None:
            self._count_clipped(row, left, scaled)
        wanted = nearest(scaled, kind, may_clip=is_clipped)
        halves = self._buffer("halves", torch.float16, weight.shape)
        value = self._buffer("value", torch.float32, weight.shape).copy_(half_values(codes, kind, halves))
        differs = np.flatnonzero(wanted.numpy() != codes.numpy())
        if differs.size:
            at = torch.from_numpy(differs)
            own = codes.reshape(-1)[at]
            judged = self._judge(row, left, columns, at, scaled.view(-1)[at], own, wanted.view(-1)[at])
            value.view(-1)[at] = judged.float() / HALF_UNIT
        grid = scale.shape[1] if scale.dim() == 2 else 1
        by_unit = (rows, grid, -1)  # columns that share a scale: norms need no multiplying out
        norms = [torch.linalg.vector_norm(one.view(by_unit), dim=2).double() for one in (scaled, value)]
        error = torch.sub(scaled, value, alpha=HALF_UNIT, out=value)
        norms = [norms[0], norms[1] * HALF_UNIT, torch.linalg.vector_norm(error.view(by_unit), dim=2).double()]
        units = scale.double() if scale.dim() == 2 else scale.double()[None]
        high = self.spec.block[0] if self.spec.block else 1
        units = units.repeat_interleave(high, 0)[:rows] if high > 1 else units
        return torch.stack([((norm * units) ** 2).sum(1) for norm in norms])

    def _buffer(self, name: str, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        """Memory that is used again for each panel: fresh megabytes cost more than the work on them."""
        held = self._held.get(name)
        if held is None or held.numel() < shape.numel():
            held = self._held[name] = torch.empty(shape.numel(), dtype=dtype)
        return held[: shape.numel()].view(shape)

    def _note_units(self, row: int, rows: int, amax: torch.Tensor, scale: torch.Tensor) -> None:
        """Keep the units' ranges."""
        self.amax = max(self.amax, float(amax.max()))
        if self._ranges is None:
            hold_to_amax(self.bad_ratio, self.inexact, self.spec, scale, amax, begin=row * scale.shape[1])
            return
        part = unit_rows(self.spec, row, rows)
        self._ranges[part] = torch.maximum(self._ranges[part], amax)
        if self._clipped is None and bool((amax > scale * self.spec.format.codes.maximum).any()):
            self._clipped = torch.zeros(self._ranges.shape, dtype=torch.int64)

    def _count_clipped(self, row: int, left: int, scaled: torch.Tensor) -> None:
        assert self._clipped is not None
        counts = unit_counts(scaled.abs() > self.spec.format.codes.reach, self.spec)
        part = self._clipped[unit_rows(self.spec, row, len(scaled))]
        if self.spec.block is not None:
            first = left // self.spec.block[1]
            part = part[:, first : first + counts.shape[1]]
        part += counts

    def finish(self, scale: torch.Tensor | None) -> Comparison:
        """Reduce what was kept per unit. `scale`: float32, of all units; not looked at for groups."""
        if self._ranges is not None and scale is not None:
            if self._clipped is not None:
                self.worst_unit = int(self._clipped.argmax())
                self.most_clipped = int(self._clipped.max())
            if self.units > KEPT_UNITS:
                hold_to_amax(self.bad_ratio, self.inexact, self.spec, scale, self._ranges)
                self.foreign_scales = _foreign_scales(scale, self._ranges, self.spec)
        self._ranges = self._clipped = None
        self._held.clear()
        return self

    def _judge(
        self,
        row: int,
        left: int,
        columns: int,
        at: torch.Tensor,
        scaled: torch.Tensor,
        codes: torch.Tensor,
        wanted: torch.Tensor,
    ) -> torch.Tensor:
        """Codes that are not the nearest: within half a step and a bf16 rounding (D1), and how far by steps (D2).

        Returns their values, NaN for codes that are."""
        kind = self.spec.format.codes
        target, value = scaled.double(), values(codes, kind).double()
        value[(codes & 0x7F) == 0x7F] = math.nan  # of FP4 no code looks so
        distance = step(target, kind)
        clipped = (target.abs() >= kind.maximum) & (value == target.sign() * kind.maximum)
        off = ~(((target - value).abs() <= distance / 2 + target.abs() / 256) | clipped)
        self.unequal += len(at)
        surplus = (target - value).abs() - (target - values(wanted, kind)).abs()
        self.not_nearest += int((surplus > distance / 1e4).sum())  # of a tie both sides are nearest
        self.far += int(((ordinal(codes, kind) - ordinal(wanted, kind)).abs() > 1).sum())
        self.off += int(off.sum())
        if self.first_off is None and off.any():
            first = int(torch.nonzero(off)[0])
            flat = int(at[first])
            self.first_off = ([row + flat // columns, left + flat % columns], float(target[first]), float(value[first]))
        return value

    def _note_rows(self, row: int, sums: torch.Tensor) -> None:
        """Sums for rel-L2, and the cosine of the worst row; `sums` as in `_add_panel`."""
        source, restored, error = sums
        self.error_sq += float(error.nan_to_num().sum())
        self.source_sq += float(source.nan_to_num().sum())
        # law of cosines, from norms that are there already
        cosine = (source + restored - error) / (2 * (source * restored).sqrt()).clamp(min=1e-300)
        cosine = torch.where((source > 0) & (restored > 0), cosine, torch.where(source == restored, 1.0, 0.0))
        cosine = cosine.nan_to_num(1.0)  # V1 speaks of those
        worst = int(cosine.argmin())
        if float(cosine[worst]) < self.worst_cosine:
            self.worst_cosine, self.worst_row = float(cosine[worst]), row + worst


# ---------------------------------------------------------------------------------------------- scales and ranges

Arithmetic = Callable[[torch.Tensor], torch.Tensor]
"""Unit absmax to scale, float32 to float32."""


def hold_to_amax(
    bad: Share,
    inexact: dict[Arithmetic, Share],
    spec: Spec,
    scale: torch.Tensor,
    amax: torch.Tensor,
    *,
    begin: int = 0,
) -> None:
    """Count units whose scale does not fit their range; for FP8 also whether it is absmax / 448 to the last bit."""
    low, high = spec.format.amax_ratio
    ratio = scale * spec.format.codes.maximum / amax
    wrong = (amax > 0) & torch.isfinite(amax) & torch.isfinite(scale) & ~((ratio >= low) & (ratio <= high))
    if spec.format.name == "NVFP4":
        wrong &= ~is_coarse(scale)
    bad.note(wrong, begin, ratio, amax)
    if spec.format == FP8:
        is_known = amax != 0  # of zeros any scale is right; compressed-tensors writes the epsilon of its dtype
        for exact in ARITHMETICS:
            expected = exact(amax)
            inexact.setdefault(exact, Share()).note(is_known & (scale != expected), begin, scale, expected)


def _divided(amax: torch.Tensor) -> torch.Tensor:
    return amax.clamp(min=1e-12) / 448


def _times_inverse(amax: torch.Tensor) -> torch.Tensor:
    return amax * np.float32(1 / 448).item()


def _inverted_twice(amax: torch.Tensor) -> torch.Tensor:
    return 1 / (448 / amax)


def _in_bfloat16(amax: torch.Tensor) -> torch.Tensor:
    return _divided(amax).bfloat16().float()


def _in_float16(amax: torch.Tensor) -> torch.Tensor:
    return _divided(amax).half().float()


ARITHMETICS: tuple[Arithmetic, ...] = (_divided, _times_inverse, _inverted_twice, _in_bfloat16, _in_float16)
"""The engine's and llm-compressor's, torchao's, AutoFP8's; scales stored in bf16 or fp16."""

SHRINKS = tuple(step / 100 for step in range(100, 79, -1))
"""Shares of absmax that the engine's mse observer chooses from."""


def engine_scales(amax: np.float32, spec: Spec) -> list[np.float32]:
    """Every scale that this engine may give a unit of this range: one under absmax, one per shrink under mse."""
    shrinks = SHRINKS[:1] if spec.minmax else SHRINKS
    return [np.float32(max(amax * np.float32(shrink), np.float32(1e-12)) / np.float32(448)) for shrink in shrinks]


def _foreign_scales(scale: torch.Tensor, amax: torch.Tensor, spec: Spec) -> int:
    known = torch.zeros(scale.shape, dtype=torch.bool)
    for shrink in SHRINKS[:1] if spec.minmax else SHRINKS:
        known |= scale == _divided(amax * shrink)
    return int((~known).sum())
