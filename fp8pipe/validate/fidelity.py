"""Codes and scales against the source they were made from (checks V5, V7, D1 to D6).

In: tiles of codes and of the source's values, handed over by the pass in `values.py`. Out: one `Comparison` per weight,
and the judgement on it.

Nearly every code is the one that rounding to nearest gives, which one vectorised cast tells. Only the others are held
against the exact rule of D1, in float64. The cast here is torch's own and not the engine's, so that a mistake of the
engine is not repeated by its judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8pipe.checkpoint import TensorInfo
from fp8pipe.validate.config import Spec
from fp8pipe.validate.findings import Fault, check
from fp8pipe.validate.values import Magnitudes, Measured, sharing_group, weight_scale_of

if TYPE_CHECKING:
    import torch

    from fp8pipe.validate.subject import Subject

E4M3_MAX = 448.0
REL_L2 = {"warning": 0.035, "error": 0.06}
"""Of a whole FP8 weight; 0.026 is measured on real ones."""
MIN_COSINE = 0.998
"""Of a row. Were every weight of it off by a full half step (1/16), it would be 0.99805: less is lost to underflow."""
AMAX_RATIO = (0.5, 1.01)
"""scale * 448 over the unit's largest source weight: 1 for absmax, down to one half for MSE observers, bf16 above."""
OTHER_MATRIX = "vLLM serves another matrix than the source's, without a word"
AGAIN = "quantize again"
EXACT_SHARE = 0.9
"""When so many scales equal absmax / 448 in one arithmetic, the others must too."""


class Comparison:
    """One quantized weight beside its source, filled tile by tile."""

    def __init__(self, entry: TensorInfo, twin: TensorInfo, spec: Spec, scale: np.ndarray[Any, Any]) -> None:
        import torch

        self.entry = entry
        self.spec = spec
        self.scale = torch.from_numpy(scale.astype(np.float32)).reshape(spec.scale_shapes(entry.shape)[0])
        self._dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[twin.dtype]
        self.amax = np.zeros(tuple(self.scale.shape), np.float32)
        """Largest source magnitude per scale unit."""
        self.off = 0
        """Codes that break D1."""
        self.first_off: tuple[list[int], float, float] | None = None
        """Index, source / scale, and the code's value, of the first of them."""
        self.not_nearest = 0
        self.far = 0
        """Codes more than one step from the nearest."""
        self.clipped = np.zeros(tuple(self.scale.shape), np.int64)
        """Source weights beyond scale * 448, per scale unit."""
        self.zero_codes = 0
        self.zero_source = 0
        self.nonfinite_source = 0
        self.error_sq = 0.0
        self.source_sq = 0.0
        self.worst_cosine = 1.0
        self.worst_row = 0

    @property
    def rel_l2(self) -> float:
        """Norm of the quantization error over the norm of the source."""
        return math.sqrt(self.error_sq / self.source_sq) if self.source_sq else 0.0

    def add(self, row: int, tile: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> None:
        """Bytes of whole rows from `row` on: codes and source values."""
        import torch

        columns = self.entry.shape[1]
        codes = torch.from_numpy(tile).view(-1, columns)
        weight = torch.from_numpy(source).view(self._dtype).view(-1, columns).float()
        scale = self._scale_of(row, len(codes), columns)
        self._take_amax(row, weight)
        scaled = weight / scale
        nearest = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        other = torch.nonzero((nearest != codes).view(-1)).view(-1)
        if len(other):
            self._judge(row, other, scaled.view(-1)[other], codes.view(-1)[other], nearest.view(-1)[other])
        if self._exceeds(row, len(codes)):
            self._count_clipped(row, (scaled.abs() > E4M3_MAX).numpy())
        self.zero_codes += int(((codes & 0x7F) == 0).sum())
        self.zero_source += int((weight == 0).sum())
        self._measure_error(row, weight, codes.view(torch.float8_e4m3fn).float() * scale)

    def finish(self) -> Comparison:
        return self

    def _scale_of(self, row: int, rows: int, columns: int) -> torch.Tensor:
        """Broadcastable to [rows, columns]."""
        if self.spec.block is None:
            return self.scale if self.scale.dim() == 1 else self.scale[row : row + rows]
        high, wide = self.spec.block
        first, last = row // high, -(-(row + rows) // high)
        return self.scale[first:last].repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]

    @property
    def unit_size(self) -> int:
        """Weights that share a scale (at the edges of a block grid: at most)."""
        rows, columns = self.entry.shape
        if self.spec.block is not None:
            return min(rows, self.spec.block[0]) * min(columns, self.spec.block[1])
        return columns if self.spec.strategy == "channel" else rows * columns

    def _units(self, row: int, rows: int) -> slice:
        """The rows of a per-unit array that belong to `rows` rows of the weight from `row` on."""
        if self.spec.strategy == "tensor":
            return slice(None)
        high = self.spec.block[0] if self.spec.block else 1
        return slice(row // high, -(-(row + rows) // high))

    def _take_amax(self, row: int, weight: torch.Tensor) -> None:
        tops = self._reduce(np.maximum, np.abs(weight.numpy()))
        part = self._units(row, len(weight))
        self.amax[part] = np.maximum(self.amax[part], tops)

    def _count_clipped(self, row: int, beyond: np.ndarray[Any, Any]) -> None:
        self.clipped[self._units(row, len(beyond))] += self._reduce(np.add, beyond.astype(np.int64))

    def _reduce(self, operation: np.ufunc, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """[rows, columns] -> per unit."""
        if self.spec.strategy == "tensor":
            return operation.reduce(values, axis=None, keepdims=True).reshape(1)
        if self.spec.block is None:
            return operation.reduce(values, axis=1, keepdims=True)
        high, wide = self.spec.block
        bands = operation.reduceat(values, np.arange(0, values.shape[0], high), axis=0)
        return operation.reduceat(bands, np.arange(0, values.shape[1], wide), axis=1)

    def _exceeds(self, row: int, rows: int) -> bool:
        """Whether any unit of these rows has weights beyond scale * 448."""
        part = self._units(row, rows)
        return bool((self.amax[part] > self.scale.numpy()[part] * np.float32(E4M3_MAX)).any())

    def _judge(
        self, row: int, at: torch.Tensor, scaled: torch.Tensor, codes: torch.Tensor, nearest: torch.Tensor
    ) -> None:
        """Codes that are not the nearest: within half a step and a bf16 rounding (D1), and how far by steps (D2)."""
        import torch

        wanted, value = scaled.double(), codes.view(torch.float8_e4m3fn).double()
        exponent = torch.frexp(wanted).exponent.double() - 1
        step = torch.exp2(exponent.clamp(min=-6) - 3)
        clipped = (wanted.abs() >= E4M3_MAX) & (value == wanted.sign() * E4M3_MAX)
        off = ~(((wanted - value).abs() <= step / 2 + wanted.abs() / 256) | clipped)
        self.not_nearest += int((wanted != value).logical_and((codes ^ nearest) != 0x80).sum())
        self.far += int(((_ordinal(codes) - _ordinal(nearest)).abs() > 1).sum())
        self.nonfinite_source += int((~torch.isfinite(wanted)).sum())
        if not off.any():
            return
        self.off += int(off.sum())
        if self.first_off is None:
            first = int(torch.nonzero(off)[0])
            flat = int(at[first])
            columns = self.entry.shape[1]
            self.first_off = ([row + flat // columns, flat % columns], float(wanted[first]), float(value[first]))

    def _measure_error(self, row: int, weight: torch.Tensor, restored: torch.Tensor) -> None:
        """Sums for rel-L2 and the rows' cosines; scaled by the tile's largest value so that no square underflows."""
        import torch

        top = float(weight.abs().max())
        if not 0 < top < math.inf:
            return
        weight, restored = weight / top, restored / top
        error = torch.linalg.vector_norm(weight - restored, dim=1, dtype=torch.float64)
        norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
        length = torch.linalg.vector_norm(restored, dim=1, dtype=torch.float64)
        self.error_sq += float((error**2).sum()) * top * top
        self.source_sq += float((norm**2).sum()) * top * top
        # law of cosines, from norms that are there already
        cosine = (norm**2 + length**2 - error**2) / (2 * norm * length).clamp(min=1e-300)
        cosine = torch.where((norm > 0) & (length > 0), cosine, torch.where(norm == length, 1.0, 0.0))
        worst = int(cosine.argmin())
        if float(cosine[worst]) < self.worst_cosine:
            self.worst_cosine, self.worst_row = float(cosine[worst]), row + worst


def _ordinal(codes: torch.Tensor) -> torch.Tensor:
    """Codes numbered in the order of their values, both zeros alike."""
    import torch

    magnitude = (codes & 0x7F).to(torch.int16)
    return torch.where(codes >= 0x80, -magnitude, magnitude)


# ---------------------------------------------------------------------------------------------- checks


def _measured(subject: Subject) -> Measured:
    assert subject.measured is not None
    return subject.measured


def _weights(subject: Subject) -> Iterator[tuple[str, Comparison, Magnitudes]]:
    """(module, comparison, magnitudes) of every weight that was compared."""
    for name, comparison in _measured(subject).comparisons.items():
        yield name.removesuffix(".weight"), comparison, _measured(subject).tensors[name]


@check(
    "V5",
    "No weight is all zero where the source is not.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence="vLLM serves a layer that answers nothing, without a word",
    remedy=AGAIN,
)
def weights_are_not_blank(subject: Subject) -> Iterator[Fault]:
    for _, comparison, seen in _weights(subject):
        if seen.is_zero and comparison.amax.any():
            top = float(comparison.amax.max())
            yield Fault(f"codes for weights up to {top:.3g}", "all zero", seen.entry.shard, seen.entry.name)


@check(
    "V7",
    "Codes are zero about as often as the source is.",
    depth="fidelity",
    severity="warning",
    needs=("scheme", "source"),
    consequence="vLLM serves it; small weights are lost to a scale that is too large for them",
    remedy=AGAIN,
)
def small_weights_survive(subject: Subject) -> Iterator[Fault]:
    for _, comparison, seen in _weights(subject):
        count = math.prod(seen.entry.shape)
        lost = (comparison.zero_codes - comparison.zero_source) / count
        if lost > 0.02 and not seen.is_zero:
            found = f"{100 * comparison.zero_codes / count:.1f} %"
            expected = f"{100 * comparison.zero_source / count:.1f} % zero codes, as in the source"
            yield Fault(expected, found, seen.entry.shard, seen.entry.name)


@check(
    "D1",
    "Every code is within half a step of source / scale (and one bf16 rounding), unless clipped.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence=OTHER_MATRIX,
    remedy=AGAIN,
)
def codes_are_roundings(subject: Subject) -> Iterator[Fault]:
    for _, comparison, seen in _weights(subject):
        if comparison.first_off is not None:
            at, wanted, value = comparison.first_off
            found = f"{comparison.off} codes that are not, the first at {at}: {value:g}"
            yield Fault(f"the rounding of source / scale, there {wanted:.6g}", found, seen.entry.shard, seen.entry.name)


@check(
    "D2",
    "Codes are the nearest to source / scale: all within one step but one in a thousand.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence=OTHER_MATRIX,
    remedy=AGAIN,
)
def codes_are_nearest(subject: Subject) -> Iterator[Fault]:
    loose, total, share = 0, 0, 0.0
    for _, comparison, seen in _weights(subject):
        count = math.prod(seen.entry.shape)
        total += 1
        if comparison.far > count / 1000:
            found = f"{comparison.far} of {count} are more than one step away"
            yield Fault("the nearest code or its neighbour", found, seen.entry.shard, seen.entry.name)
        elif comparison.not_nearest > count / 1000 and not comparison.off:
            loose, share = loose + 1, max(share, comparison.not_nearest / count)
    if loose:
        yield Fault(
            "the nearest code for the stored scale",
            f"{loose} of {total} weights with up to {100 * share:.1f} % of the codes one step away",
            severity="warning",
            consequence="vLLM serves it; the error is slightly above the least possible, as when scales are rounded "
            "to bf16 after use or the division is made in bf16",
            remedy="quantize with the scale that is stored, in float32",
        )


@check(
    "D3",
    "The quantization error of a whole weight is that of FP8.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence=OTHER_MATRIX,
    remedy=AGAIN,
)
def error_is_that_of_fp8(subject: Subject) -> Iterator[Fault]:
    for _, comparison, seen in _weights(subject):
        if comparison.rel_l2 > REL_L2["warning"]:
            severity = "error" if comparison.rel_l2 > REL_L2["error"] else "warning"
            expected = f"relative error (L2) at most {REL_L2['warning']}"
            yield Fault(expected, f"{comparison.rel_l2:.4g}", seen.entry.shard, seen.entry.name, severity)


@check(
    "D4",
    "Every tensor that is not quantized equals the source, byte for byte.",
    depth="fidelity",
    needs=("source",),
    consequence="vLLM serves altered weights, without a word",
    remedy=AGAIN,
)
def kept_tensors_are_untouched(subject: Subject) -> Iterator[Fault]:
    for name, offset in _measured(subject).altered.items():
        entry = subject.shelf.tensors[name]
        yield Fault("the source's bytes", f"the first other byte at {offset} of {entry.nbytes}", entry.shard, name)


@check(
    "D5",
    "Every row points where the source's row does: cosine at least 0.998.",
    depth="fidelity",
    severity="warning",
    needs=("scheme", "source"),
    consequence="vLLM serves it; this output channel is worse than FP8 should be",
    remedy=AGAIN,
)
def rows_keep_their_direction(subject: Subject) -> Iterator[Fault]:
    for _, comparison, seen in _weights(subject):
        if comparison.worst_cosine < MIN_COSINE and not comparison.off:  # D1 says more
            found = f"{comparison.worst_cosine:.5f} in row {comparison.worst_row}"
            yield Fault(f"cosine at least {MIN_COSINE}", found, seen.entry.shard, seen.entry.name)


@check(
    "D6",
    "Scales belong to their weights: scale * 448 is the largest source weight of the unit.",
    depth="fidelity",
    needs=("scheme", "source"),
    consequence="vLLM multiplies the codes by a wrong scale, without a word",
    remedy=AGAIN,
)
def scales_match_their_weights(subject: Subject) -> Iterator[Fault]:
    found = [(seen, _scale_and_amax(subject, module, comparison)) for module, comparison, seen in _weights(subject)]
    rows = [(seen, *pair) for seen, pair in found if pair is not None]
    exact = _arithmetic([(scale, amax) for _, scale, amax in rows])
    for seen, scale, amax in rows:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = scale * E4M3_MAX / amax
        bad = (amax > 0) & ~((ratio >= AMAX_RATIO[0]) & (ratio <= AMAX_RATIO[1]))
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            expected = f"scale * 448 / amax in {AMAX_RATIO[0]} to {AMAX_RATIO[1]}"
            found = f"{ratio.flat[first]:.4g} in unit {first}; {int(bad.sum())} of {bad.size} units"
            yield Fault(expected, found, seen.entry.shard, seen.entry.name)
        elif exact is not None and (bad := scale != exact(amax)).any():
            first = int(np.flatnonzero(bad)[0])
            expected = f"{float(exact(amax).flat[first])!r}, absmax / 448 like the other scales"
            found = f"{float(scale.flat[first])!r} in unit {first}; {int(bad.sum())} of {bad.size} units"
            yield Fault(expected, found, seen.entry.shard, seen.entry.name)


def _scale_and_amax(subject: Subject, module: str, comparison: Comparison) -> tuple[Any, Any] | None:
    """Scale and source amax per unit, float64; where fused siblings share the scale, amax is over all of them.

    None when a sibling that may share it could not be compared.
    """
    scale, members = weight_scale_of(subject, module), sharing_group(subject, module)
    if scale is None or members is None:
        return None
    together = [_measured(subject).comparisons.get(f"{member}.weight") for member in members]
    if len(members) == 1:
        return scale.reshape(comparison.amax.shape), comparison.amax.astype(np.float64)
    if None in together:
        return None
    return scale.reshape(1), np.array([max(float(c.amax.max()) for c in together if c is not None)])


def _arithmetic(pairs: list[tuple[Any, Any]]) -> Arithmetic | None:
    """The arithmetic in which nearly all scales are exactly absmax / 448, None when there is no such."""
    if not pairs:
        return None
    scales = np.concatenate([scale.ravel() for scale, _ in pairs])
    amaxes = np.concatenate([amax.ravel() for _, amax in pairs])
    shares = {exact: (scales == exact(amaxes)).mean() for exact in ARITHMETICS}
    best = max(ARITHMETICS, key=lambda exact: shares[exact])
    return best if shares[best] >= EXACT_SHARE else None


Arithmetic = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""Unit absmax to scale, float64 to float64."""


def _divided(amax: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    floor = np.maximum(amax.astype(np.float32), np.float32(1e-12))
    return (floor / np.float32(E4M3_MAX)).astype(np.float64)


def _times_inverse(amax: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (amax.astype(np.float32) * np.float32(1 / E4M3_MAX)).astype(np.float64)


def _inverted_twice(amax: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(divide="ignore"):
        return (np.float32(1) / (np.float32(E4M3_MAX) / amax.astype(np.float32))).astype(np.float64)


def _in_bfloat16(amax: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import torch

    return torch.from_numpy(_divided(amax)).bfloat16().double().numpy()


def _in_float16(amax: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):
        return _divided(amax).astype(np.float16).astype(np.float64)


ARITHMETICS: tuple[Arithmetic, ...] = (_divided, _times_inverse, _inverted_twice, _in_bfloat16, _in_float16)
"""The engine's and llm-compressor's, torchao's, AutoFP8's; scales stored in bf16 or fp16."""
