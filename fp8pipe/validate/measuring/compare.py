"""Compares one quantized weight with its source, tile by tile: every code, every row, every scale.

Nearly every code is the one that rounding to nearest gives, and one vectorised cast shows which are not. Only those are
judged by the exact rule of D1, in float64. The cast is torch's own and not the engine's, so that the validator does not
repeat a mistake of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from fp8pipe.model.headers import TensorInfo
from fp8pipe.quantize.numerics import SHRINKS
from fp8pipe.validate.meaning.formats import E4M3, FP8, Spec
from fp8pipe.validate.measured import Array, Comparison, Share
from fp8pipe.validate.measuring.units import (
    FAINT,
    NOTHING,
    amax_of,
    is_coarse,
    magnitudes,
    nearest,
    ordinal,
    step,
    unit_rows,
    unit_tops,
    values,
)

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TILE = 1 << 20
"""Weights per call of `add`: with fewer the share of Python's own time grows."""
PANEL = 1 << 18
"""Of them, what torch works on at a time: more do not fit a core's cache."""


class Comparer:
    """Fills the Comparison of one quantized weight with its source, tile by tile."""

    def __init__(self, entry: TensorInfo, source_dtype: str, spec: Spec, shape: tuple[int, int]) -> None:
        """`shape`: [out, in], of the weight and not of its codes as they are packed."""
        self._found = Comparison(entry, spec, shape)
        self._spec, self._codes = spec, spec.format.codes
        self._dtype = source_dtype
        self._ranges = torch.zeros(spec.units(shape)) if spec.strategy != "group" else None
        """Largest source magnitude of each unit; groups are too many to keep them."""
        self._clipped: torch.Tensor | None = None
        """Clipped source weights of each unit, from the first on that has any."""
        self._differs: torch.Tensor | None = None

    def add(self, row: int, codes: torch.Tensor, source: Array, scale: torch.Tensor) -> None:
        """Compare whole rows from `row` on: codes uint8 [rows, columns], the source's bytes, float32 scales of their
        units."""
        weight = torch.from_numpy(source).view(KINDS[self._dtype]).view(codes.shape)
        if self._codes is E4M3:
            norms = self._add_compiled(row, codes, weight, scale)
        else:
            norms = self._add_in_torch(row, codes, weight, scale)
        self._note_rows(row, norms)

    def finish(self, scale: torch.Tensor | None) -> Comparison:
        """What was found. `scale`: float32, of all units; not looked at for groups."""
        found = self._found
        if self._ranges is not None and scale is not None:
            if self._clipped is not None:
                found.worst_unit, found.most_clipped = int(self._clipped.argmax()), int(self._clipped.max())
            if self._spec.strategy != "tensor":  # whose range may be that of a fused group (D6)
                hold_to_amax(found.bad_ratio, found.inexact, self._spec, scale, self._ranges)
                found.foreign_scales = _foreign_scales(scale, self._ranges, self._spec)
        return found

    # ------------------------------------------------------------------------------------------ tiles

    def _add_compiled(self, row: int, codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Compare E4M3 codes; returns squared norms of source, restored weight and error: float64 [3, rows]."""
        from fp8pipe.validate.measuring.kernels import compare  # numba takes a second to import

        rows, columns = codes.shape
        grid = scale.view(-1, scale.shape[-1])
        high, wide = self._spec.block or (1 if self._spec.strategy == "channel" else rows, columns)
        tops, clipped = torch.zeros(grid.shape), torch.zeros(grid.shape, dtype=torch.int64)
        norms = torch.empty(3, rows, dtype=torch.float64)
        if self._differs is None or self._differs.numel() < codes.numel():  # fresh megabytes cost more than the work
            self._differs = torch.empty(codes.numel(), dtype=torch.int32)
        bits = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight.float().view(torch.uint32)
        unequal, zero_codes, zero_source = compare(
            *(bits.numpy(), codes.numpy(), grid.numpy(), high, wide),
            *(tops.view(torch.int32).numpy(), clipped.numpy(), norms.numpy(), self._differs.numpy()),
        )
        self._found.zero_codes += zero_codes
        self._found.zero_source += zero_source
        self._note_units(row, rows, tops.view(scale.shape), clipped.view(scale.shape), scale)
        if unequal:
            at = self._differs[:unequal].long()
            scaled = weight.reshape(-1)[at].float() / grid[at // columns // high, at % columns // wide]
            place = torch.stack([row + at // columns, at % columns])
            self._judge(place, scaled, codes.reshape(-1)[at], nearest(scaled, self._codes))
        return norms

    def _add_in_torch(self, row: int, codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The same for E2M1 codes, whose scales are those of groups within a row: float32 [rows, groups]."""
        assert self._spec.block is not None
        (rows, columns), wide = codes.shape, self._spec.block[1]
        bits = magnitudes(weight.view(torch.uint8).view(-1).numpy(), self._dtype).view(rows, columns)
        self._note_units(row, rows, amax_of(unit_tops(bits, self._spec), self._dtype), None, scale)
        self._found.zero_codes += codes.numel() - int(np.count_nonzero(codes.numpy() & 7))
        self._found.zero_source += bits.numel() - int(np.count_nonzero(bits.numpy()))
        norms = torch.zeros(3, rows, dtype=torch.float64)
        for left, right in _panels(rows, columns, wide):
            groups = scale[:, left // wide : -(-right // wide)]
            norms += self._add_panel(row, left, weight[:, left:right], codes[:, left:right], groups)
        return norms

    def _add_panel(
        self, row: int, left: int, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Some columns from `left` on; returns squared norms as `_add_compiled` does."""
        rows, columns = weight.shape
        by_group = (rows, scale.shape[1], -1)
        scaled = (weight.float().view(by_group) / scale[:, :, None]).view(rows, columns)
        wanted, value = nearest(scaled, self._codes), values(codes, self._codes)
        differs = torch.from_numpy(np.flatnonzero(wanted.numpy() != codes.numpy()))
        if differs.numel():
            place = torch.stack([row + differs // columns, left + differs % columns])
            self._judge(place, scaled.view(-1)[differs], codes.reshape(-1)[differs], wanted.view(-1)[differs])
        parts = (scaled, value, scaled - value)
        norms = torch.stack([torch.linalg.vector_norm(part.view(by_group), dim=2).double() for part in parts])
        return ((norms * scale.double()) ** 2).sum(2)

    # ------------------------------------------------------------------------------------------ noting

    def _note_units(
        self, row: int, rows: int, amax: torch.Tensor, clipped: torch.Tensor | None, scale: torch.Tensor
    ) -> None:
        """`amax`, `clipped`: of the source in each unit, the latter if the units are kept."""
        self._found.amax = max(self._found.amax, float(amax.max()))
        if self._ranges is None:
            begin = row * scale.shape[1]
            hold_to_amax(self._found.bad_ratio, self._found.inexact, self._spec, scale, amax, begin=begin)
            return
        part = unit_rows(self._spec, row, rows)
        self._ranges[part] = torch.maximum(self._ranges[part], amax)
        if clipped is not None and clipped.any():
            if self._clipped is None:
                self._clipped = torch.zeros(self._ranges.shape, dtype=torch.int64)
            self._clipped[part] += clipped

    def _judge(self, place: torch.Tensor, scaled: torch.Tensor, codes: torch.Tensor, wanted: torch.Tensor) -> None:
        """Judge codes that are not `wanted`, the nearest: within half a step and a bf16 rounding (D1), by steps (D2).

        `place`: [2, codes], row and column. `scaled`: source / scale."""
        found, kind = self._found, self._codes
        target, value = scaled.double(), values(codes, kind).double()
        distance = step(target, kind)
        clipped = (target.abs() >= kind.maximum) & (value == target.sign() * kind.maximum)
        off = ~(((target - value).abs() <= distance / 2 + target.abs() / 256) | clipped)
        surplus = (target - value).abs() - (target - values(wanted, kind)).abs()
        found.unequal += codes.numel()
        found.not_nearest += int((surplus > distance / 1e4).sum())  # at a tie both neighbours are nearest
        found.far += int(((ordinal(codes, kind) - ordinal(wanted, kind)).abs() > 1).sum())
        found.off += int(off.sum())
        if found.first_off is None and off.any():
            first = int(torch.nonzero(off)[0])
            found.first_off = (place[:, first].tolist(), float(target[first]), float(value[first]))

    def _note_rows(self, row: int, norms: torch.Tensor) -> None:
        """Sums for rel-L2, and the cosine of the worst row. `norms`: as `_add_compiled` returns them."""
        source, restored, error = norms
        limit = FAINT**2 * self._found.shape[1]
        faint = (source > 0) & (source < limit) & (restored < 4 * limit)
        source, restored, error = (part.masked_fill(faint, 0) for part in norms)
        self._found.error_sq += float(error.nan_to_num().sum())
        self._found.source_sq += float(source.nan_to_num().sum())
        # law of cosines: the norms are known already
        cosine = (source + restored - error) / (2 * (source * restored).sqrt()).clamp(min=1e-300)
        cosine = torch.where((source > 0) & (restored > 0), cosine, torch.where(source == restored, 1.0, 0.0))
        cosine = cosine.nan_to_num(1.0)  # V1 reports what is not finite
        worst = int(cosine.argmin())
        if float(cosine[worst]) < self._found.worst_cosine:
            self._found.worst_cosine, self._found.worst_row = float(cosine[worst]), row + worst


def _panels(rows: int, columns: int, wide: int) -> Iterator[tuple[int, int]]:
    """(left, right) of columns that fit a core's cache: whole groups, or the last, narrower one."""
    width, whole = max(1, PANEL // (rows * wide)) * wide, columns - columns % wide
    yield from ((left, min(left + width, whole)) for left in range(0, whole, width))
    if whole < columns:
        yield whole, columns


# ---------------------------------------------------------------------------------------------- scales and ranges


def hold_to_amax(
    bad: Share, inexact: dict[str, Share], spec: Spec, scale: torch.Tensor, amax: torch.Tensor, *, begin: int = 0
) -> None:
    """Count units whose scale does not fit their range; for FP8 also whether it is absmax / 448 to the last bit.

    `begin`: number of the first unit."""
    low, high = spec.format.amax_ratio
    ratio = scale * spec.format.codes.maximum / amax
    floor = _own_scale(torch.tensor(FAINT), 1.0, spec)
    blank = amax <= NOTHING * floor  # zeros, or no code but zero: any scale is right
    wrong = (
        ~blank
        & ~((amax < FAINT) & (scale == floor))
        & torch.isfinite(amax)
        & torch.isfinite(scale)
        & ~((ratio >= low) & (ratio <= high))
    )
    if spec.format.name == "NVFP4":
        wrong &= ~is_coarse(scale)
    _note(bad, wrong, begin, ratio, amax)
    if spec.format == FP8:
        is_known = ~blank  # compressed-tensors writes the epsilon of its dtype there, this engine 1
        for name, exact in ARITHMETICS.items():
            expected = exact(amax)
            _note(inexact.setdefault(name, Share()), is_known & (scale != expected), begin, scale, expected)


def _note(share: Share, flags: torch.Tensor, begin: int, value: torch.Tensor, wanted: torch.Tensor) -> None:
    """Count the units that are flagged."""
    found = int(flags.sum())
    if found and share.count == 0:
        at = int(torch.nonzero(flags.reshape(-1))[0])
        share.first, share.value, share.wanted = begin + at, float(value.flatten()[at]), float(wanted.flatten()[at])
    share.count += found


def _divided(amax: torch.Tensor) -> torch.Tensor:
    return amax.clamp(min=1e-12) / 448


def _power_above(scale: torch.Tensor) -> torch.Tensor:
    """The least power of two that is not below `scale`."""
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    return torch.ldexp(torch.where(mantissa > 0.5, 1.0, 0.5), exponent)


ARITHMETICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "divided": _divided,
    "times inverse": lambda amax: amax * np.float32(1 / 448).item(),
    "inverted twice": lambda amax: 1 / (448 / amax),
    "in bfloat16": lambda amax: _divided(amax).bfloat16().float(),
    "in float16": lambda amax: _divided(amax).half().float(),
}
"""How a unit's absmax becomes its scale, float32 to float32: `divided` in this engine and llm-compressor, `times
inverse` in torchao, `inverted twice` in AutoFP8. The last two divide, and store the scale in bf16 or fp16."""


def _shrinks(spec: Spec) -> tuple[float, ...]:
    """Shares of absmax that this engine's observer may choose."""
    return (1.0,) if spec.minmax else SHRINKS


def engine_scales(amax: np.float32, spec: Spec) -> list[np.float32]:
    """Every scale that this engine may give a unit of this range: one under absmax, one per shrink under mse."""
    found = _scales_of(torch.tensor(amax), spec)
    return [np.float32(scale.item()) for scale in found]


def _foreign_scales(scale: torch.Tensor, amax: torch.Tensor, spec: Spec) -> int:
    known = torch.zeros(scale.shape, dtype=torch.bool)
    for own in _scales_of(amax, spec):
        known |= scale == own
    return int((~known).sum())


def _scales_of(amax: torch.Tensor, spec: Spec) -> Iterator[torch.Tensor]:
    """The scales that this engine may give units of these ranges. Where it leaves no code but zero that is 1, and in
    its former versions, or beside a fused sibling, the floor."""
    for shrink in _shrinks(spec):
        scale = _own_scale(amax, shrink, spec)
        yield scale
        yield torch.where(amax / scale <= NOTHING, 1.0, scale)


def _own_scale(amax: torch.Tensor, shrink: float, spec: Spec) -> torch.Tensor:
    scale = _divided(amax * shrink)
    return _power_above(scale) if spec.format.by_powers else scale
