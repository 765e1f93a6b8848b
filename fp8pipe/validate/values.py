"""Numbers: one pass over the bytes, then judgement on what it saw (checks V1 to V10).

In: a Subject whose headers are read. Out: `Measured`, per tensor the largest magnitude of every scale unit and where
NaN or Inf first stands, per scale its values; with a source also the comparison of `fidelity.py`, on the same tiles.

Magnitudes are compared as integers: without its sign bit any IEEE-like format orders as its bytes do, NaN on top. So
one AND and one max per tile answer at once whether a unit is zero, saturated, infinite or not a number.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fp8pipe.checkpoint import SourceFiles, TensorInfo
from fp8pipe.progress import Progress, ProgressEvent
from fp8pipe.validate.config import Spec
from fp8pipe.validate.coverage import COMPANIONS, KV_LEAVES
from fp8pipe.validate.files import Shelf
from fp8pipe.validate.findings import Fault, check

if TYPE_CHECKING:
    from fp8pipe.validate.fidelity import Comparison
    from fp8pipe.validate.subject import Subject

TILE_BYTES = 1 << 18
"""Bytes of codes in hand at a time: with their float32 work they stay near a core's L2; 1 << 20 is half as fast."""
MAX_ROW_BYTES = 1 << 26
"""A row (times the block's rows) longer than this belongs to no Linear: the tensor is measured as one unit."""
MAX_SCALE_BYTES = 1 << 28
"""Scales are held in memory: block scales of the largest known model are 50 MB in all."""

MAGNITUDES: dict[str, tuple[Any, int, int]] = {
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E5M2": (np.uint8, 0x7F, 0x7C),
    "F8_E8M0": (np.uint8, 0xFF, 0xFF),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}
"""Integer view, mask that drops the sign, and the first magnitude that is not a finite number."""
SMALLEST_NORMAL = {"F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14}
NEAR_TOP = 0x7D
"""Magnitude code of 416, one step below 448: an absmax scale puts at least one weight of each unit here or higher."""

PLACEHOLDERS = (float(np.finfo(np.float32).min), -1.0)
"""What vLLM and old tools put where a scale is yet to come."""
FP16_SAFE = (3.1e-5, 146.0)
"""Range of per-tensor scales for which vLLM's requantization through fp16 is exact."""


# ---------------------------------------------------------------------------------------------- the pass


@dataclass
class Magnitudes:
    """The largest magnitudes of one tensor."""

    entry: TensorInfo
    spec: Spec | None
    """How it is quantized; None for tensors that are not."""
    tops: np.ndarray[Any, Any]
    """Largest magnitude per scale unit, as integer: [1], [out, 1] or [row blocks, column blocks]."""
    nonfinite: int = 0
    """Elements that are NaN or Inf."""
    first_nonfinite: int = 0
    """Flat index of the first."""

    @property
    def is_zero(self) -> bool:
        return self.entry.nbytes > 0 and not self.tops.any()


@dataclass
class Measured:
    """What the pass over the data saw."""

    tensors: dict[str, Magnitudes] = field(default_factory=dict)
    scales: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    """Values of every scale as float64, in its own shape."""
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Quantized weights against the source."""
    altered: dict[str, int] = field(default_factory=dict)
    """Tensors that should equal the source, with the byte offset of the first difference."""
    bytes_read: int = 0

    def in_order_of(self, entries: Iterable[TensorInfo]) -> Measured:
        """The same, in the order of the files and not in that in which threads finished."""
        place = {entry.name: number for number, entry in enumerate(entries)}
        return Measured(
            _sorted(self.tensors, place),
            _sorted(self.scales, place),
            _sorted(self.comparisons, place),
            _sorted(self.altered, place),
            self.bytes_read,
        )


T = TypeVar("T")


def _sorted(part: dict[str, T], place: dict[str, int]) -> dict[str, T]:
    return dict(sorted(part.items(), key=lambda item: place[item[0]]))


def measure(subject: Subject, *, with_source: bool, progress: Progress) -> Measured:
    """Read every byte of the checkpoint once, and of the source once if asked for; one thread per core."""
    measured = Measured()
    with ExitStack() as stack:
        ours = _open(subject.shelf, stack)
        theirs = _open(subject.source, stack) if with_source and subject.source else None
        reader = Reader(subject, ours, theirs, measured)
        entries = sorted(subject.shelf.tensors.values(), key=lambda entry: (entry.shard, entry.begin))
        reader.read_scales(entries)
        pool = _pool(stack, with_torch=theirs is not None)
        total, done = sum(entry.nbytes for entry in entries), 0
        for entry, task in [(entry, pool.submit(reader.read, entry)) for entry in entries]:
            task.result()
            done += entry.nbytes
            progress(ProgressEvent("validate", done, total, "B", entry.name))
    return measured.in_order_of(entries)


def _pool(stack: ExitStack, *, with_torch: bool) -> ThreadPoolExecutor:
    """A thread per core, each alone in its torch operations: tiles are too small to be shared between threads."""
    prepare = None
    if with_torch:
        import torch

        stack.callback(torch.set_num_threads, torch.get_num_threads())
        prepare = partial(torch.set_num_threads, 1)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "validate", initializer=prepare)
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool


def _open(shelf: Shelf, stack: ExitStack) -> SourceFiles:
    opened = SourceFiles(shelf.root, stack)
    for name in shelf.shards():
        opened.open(name)
    return opened


class Reader:
    """Reads tensors in tiles and hands each tile to whoever measures it."""

    def __init__(self, subject: Subject, ours: SourceFiles, theirs: SourceFiles | None, measured: Measured) -> None:
        self.subject = subject
        self.ours = ours
        self.theirs = theirs
        self.measured = measured
        self.counting = Lock()

    def read_scales(self, entries: list[TensorInfo]) -> None:
        """Scales first: comparing codes needs them."""
        for entry in entries:
            leaf = entry.name.rpartition(".")[2]
            if leaf in COMPANIONS | KV_LEAVES and entry.dtype in SMALLEST_NORMAL and entry.nbytes <= MAX_SCALE_BYTES:
                self.measured.scales[entry.name] = as_float64(self._bytes(self.ours, entry), entry)

    def read(self, entry: TensorInfo) -> None:
        """Measure one tensor; integers have nothing to measure but are compared with the source."""
        spec = self._spec(entry)
        if self.theirs is not None and self.subject.source is not None:
            twin = self.subject.source.tensors.get(entry.name)
            if spec is not None and twin is not None and self._compare(entry, twin, spec):
                return
            if spec is None and twin is not None and self._must_equal(entry, twin):
                self._measure_and_match(entry, twin)
                return
        self._measure(entry, spec)

    def _spec(self, entry: TensorInfo) -> Spec | None:
        """The scheme of a quantized weight whose form is sound; S1 to S3 speak of the others."""
        module, _, leaf = entry.name.rpartition(".")
        if leaf != "weight" or module not in self.subject.quantized or self.subject.scheme is None:
            return None
        spec = self.subject.scheme.spec_of(module)
        is_matrix = entry.dtype == "F8_E4M3" and len(entry.shape) == 2 and 0 not in entry.shape
        return spec if is_matrix and spec and entry.shape[1] * _band(spec) <= MAX_ROW_BYTES else None

    def _must_equal(self, entry: TensorInfo, twin: TensorInfo) -> bool:
        """Kept tensors of the source's form; an unquantized weight in a quantized module is K5's."""
        is_kept = entry.name.removesuffix(".weight") not in self.subject.quantized
        return is_kept and (twin.dtype, twin.shape) == (entry.dtype, entry.shape)

    def _measure(self, entry: TensorInfo, spec: Spec | None) -> None:
        if entry.dtype not in MAGNITUDES or entry.nbytes == 0:
            return
        meter = Meter(entry, spec)
        for begin, tile in self._tiles(entry, spec):
            meter.add(begin, tile)
        self.measured.tensors[entry.name] = meter.result()

    def _measure_and_match(self, entry: TensorInfo, twin: TensorInfo) -> None:
        meter = Meter(entry, None) if entry.dtype in MAGNITUDES and entry.nbytes else None
        for offset in range(0, entry.nbytes, TILE_BYTES):
            size = min(TILE_BYTES, entry.nbytes - offset)
            tile = self._piece(self.ours, entry, offset, size)
            other = self._piece(self._source(), twin, offset, size)
            if entry.name not in self.measured.altered and not np.array_equal(tile, other):
                self.measured.altered[entry.name] = offset + int(np.flatnonzero(tile != other)[0])
            if meter is not None:
                meter.add(offset // meter.item_bytes, tile)
        if meter is not None:
            self.measured.tensors[entry.name] = meter.result()

    def _compare(self, entry: TensorInfo, twin: TensorInfo, spec: Spec) -> bool:
        """False when shapes or scale leave nothing to compare; other checks speak of it."""
        from fp8pipe.validate.fidelity import Comparison

        scale = self.measured.scales.get(f"{entry.name.removesuffix('.weight')}.{spec.scale}")
        known = twin.shape == entry.shape and twin.dtype in {"BF16", "F16", "F32"}
        if scale is None or not known or scale.shape not in spec.scale_shapes(entry.shape) or not _divides(scale):
            return False
        meter, comparison = Meter(entry, spec), Comparison(entry, twin, spec, scale)
        ratio = twin.nbytes // entry.nbytes
        for begin, tile in self._tiles(entry, spec):
            meter.add(begin, tile)
            other = self._piece(self._source(), twin, begin * ratio, tile.size * ratio)
            comparison.add(begin // entry.shape[1], tile, other)
        self.measured.tensors[entry.name] = meter.result()
        self.measured.comparisons[entry.name] = comparison.finish()
        return True

    def _source(self) -> SourceFiles:
        assert self.theirs is not None
        return self.theirs

    def _tiles(self, entry: TensorInfo, spec: Spec | None) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """(index of the first element, bytes): whole bands of rows for quantized weights, else any whole items."""
        item = np.dtype(MAGNITUDES[entry.dtype][0]).itemsize
        step = TILE_BYTES
        if spec is not None:
            band = entry.shape[1] * _band(spec)
            step = max(1, TILE_BYTES // band) * band
        for offset in range(0, entry.nbytes, step):
            yield offset // item, self._piece(self.ours, entry, offset, min(step, entry.nbytes - offset))

    def _bytes(self, files: SourceFiles, entry: TensorInfo) -> np.ndarray[Any, Any]:
        return self._piece(files, entry, 0, entry.nbytes)

    def _piece(self, files: SourceFiles, entry: TensorInfo, offset: int, size: int) -> np.ndarray[Any, Any]:
        buffer = np.empty(size, np.uint8)
        files.read_into(entry.shard, entry.begin + offset, buffer.data, entry.name)
        with self.counting:
            self.measured.bytes_read += size
        return buffer


def _band(spec: Spec) -> int:
    """Rows that must be in hand together."""
    return spec.block[0] if spec.block else 1


def _divides(scale: np.ndarray[Any, Any]) -> bool:
    return bool(scale.size and np.isfinite(scale).all() and (scale > 0).all())


def as_float64(data: np.ndarray[Any, Any], entry: TensorInfo) -> np.ndarray[Any, Any]:
    """Values of an F32, BF16 or F16 tensor."""
    if entry.dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64).reshape(entry.shape)
    return data.view({"F32": np.float32, "F16": np.float16}[entry.dtype]).astype(np.float64).reshape(entry.shape)


class Meter:
    """Largest magnitude per unit of one tensor, tile by tile."""

    def __init__(self, entry: TensorInfo, spec: Spec | None) -> None:
        kind, self.mask, self.limit = MAGNITUDES[entry.dtype]
        self.kind = np.dtype(kind)
        self.item_bytes = self.kind.itemsize
        shape = spec.scale_shapes(entry.shape)[0] if spec else (1,)
        self.seen = Magnitudes(entry, spec, np.zeros(shape, self.kind))

    def add(self, begin: int, tile: np.ndarray[Any, Any]) -> None:
        """`tile`: bytes from element `begin` on; for quantized weights whole rows (bands of rows for blocks)."""
        magnitudes = tile.view(self.kind) & self.kind.type(self.mask)
        spec, tops = self.seen.spec, self.seen.tops
        if spec is None or spec.strategy == "tensor":
            top = magnitudes.max()
            tops[0] = max(tops[0], top)
        else:
            columns = self.seen.entry.shape[1]
            band_tops = _unit_tops(magnitudes.reshape(-1, columns), spec.block)
            first = begin // columns // _band(spec)
            tops[first : first + len(band_tops)] = band_tops
            top = band_tops.max()
        if top >= self.limit:
            bad = np.flatnonzero(magnitudes >= self.limit)
            if not self.seen.nonfinite:
                self.seen.first_nonfinite = begin + int(bad[0])
            self.seen.nonfinite += len(bad)

    def result(self) -> Magnitudes:
        return self.seen


def _unit_tops(magnitudes: np.ndarray[Any, Any], block: tuple[int, int] | None) -> np.ndarray[Any, Any]:
    """[rows, columns] -> [rows, 1], or [row blocks, column blocks]."""
    if block is None:
        return magnitudes.max(axis=1, keepdims=True)
    rows = np.maximum.reduceat(magnitudes, np.arange(0, magnitudes.shape[0], block[0]), axis=0)
    return np.maximum.reduceat(rows, np.arange(0, magnitudes.shape[1], block[1]), axis=1)


# ---------------------------------------------------------------------------------------------- shared views


def _measured(subject: Subject) -> Measured:
    assert subject.measured is not None
    return subject.measured


def scales_of_kind(subject: Subject) -> Iterator[tuple[str, str, TensorInfo, np.ndarray[Any, Any]]]:
    """(kind, module, entry, values) of every scale that was read; kind: weight, input or kv."""
    for name, values in _measured(subject).scales.items():
        module, _, leaf = name.rpartition(".")
        kind = "kv" if leaf in KV_LEAVES else "weight" if leaf.startswith("weight") else "input"
        yield kind, module, subject.shelf.tensors[name], values


def weight_scale_of(subject: Subject, module: str) -> np.ndarray[Any, Any] | None:
    """Values of the module's weight scale, None when it is missing or misshapen, or the weight is."""
    spec = subject.scheme.spec_of(module) if subject.scheme else None
    weight = subject.shelf.tensors.get(f"{module}.weight")
    if spec is None or weight is None or len(weight.shape) != 2 or not _has_source_shape(subject, weight):
        return None
    scale = _measured(subject).scales.get(f"{module}.{spec.scale}")
    return scale if scale is not None and scale.shape in spec.scale_shapes(weight.shape) else None


def _has_source_shape(subject: Subject, entry: TensorInfo) -> bool:
    twin = subject.source.tensors.get(entry.name) if subject.source else None
    return twin is None or twin.shape == entry.shape


def sharing_group(subject: Subject, module: str) -> tuple[str, ...] | None:
    """The members of the module's fused group with the same per-tensor scale; a maximum over them is the unit's.

    None when a member's scale is missing or misshapen, so that nobody can tell whose maximum made it.
    """
    assert subject.layout is not None
    scale = weight_scale_of(subject, module)
    if scale is None:
        return None
    if scale.size != 1:
        return (module,)
    members = [m for m in subject.layout.group_of.get(module, (module,)) if m in subject.quantized]
    scales = {member: other for member in members if (other := weight_scale_of(subject, member)) is not None}
    if len(scales) < len(members):
        return None
    return tuple(member for member, other in scales.items() if np.array_equal(other, scale))


def _place(shape: tuple[int, ...], flat: int) -> list[int]:
    return [int(i) for i in np.unravel_index(flat, shape)] if shape else []


# ---------------------------------------------------------------------------------------------- checks


@check(
    "V1",
    "No float tensor holds NaN or Inf, no weight a NaN code.",
    depth="values",
    consequence="vLLM loads it; every answer that passes through it is NaN",
    remedy="look into the source, then quantize again",
)
def values_are_finite(subject: Subject) -> Iterator[Fault]:
    for seen in _measured(subject).tensors.values():
        if seen.nonfinite and seen.entry.name not in _measured(subject).scales:  # those are V2's
            at = _place(seen.entry.shape, seen.first_nonfinite)
            found = f"{seen.nonfinite} NaN or Inf, the first at {at}"
            yield Fault("finite values", found, seen.entry.shard, seen.entry.name)


@check(
    "V2",
    "Scales are finite, positive and normal numbers.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM loads it; the layer's output is NaN, zero or garbage (quant_method fp8: KV scales stop it)",
    remedy="quantize or calibrate again",
)
def scales_are_usable(subject: Subject) -> Iterator[Fault]:
    for _, _, entry, values in scales_of_kind(subject):
        is_placeholder = np.isin(values, PLACEHOLDERS)
        with np.errstate(invalid="ignore"):
            bad = ~(values >= SMALLEST_NORMAL[entry.dtype]) | np.isinf(values)
        bad &= ~is_placeholder  # V4's
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            found = f"{int(bad.sum())} of {bad.size}: {values.flat[first]!r} at {_place(entry.shape, first)}"
            yield Fault("finite normal values above zero", found.replace("np.float64", ""), entry.shard, entry.name)


@check(
    "V3",
    "Per-tensor scales survive vLLM's requantization through fp16.",
    depth="values",
    severity="warning",
    needs=("scheme",),
    consequence="vLLM requantizes per-tensor weights through fp16 at load; outside 3.1e-5 to 146 values change",
    remedy="use per-channel scales for this module",
)
def scales_survive_fp16(subject: Subject) -> Iterator[Fault]:
    for kind, module, entry, values in scales_of_kind(subject):
        weight = _measured(subject).tensors.get(f"{module}.weight")
        if kind != "weight" or values.size != 1 or weight is None or weight.is_zero or weight.spec is None:
            continue
        value = float(values.flat[0])
        if weight.spec.strategy == "tensor" and value > 0 and not FP16_SAFE[0] <= value <= FP16_SAFE[1]:
            yield Fault(f"{FP16_SAFE[0]} to {FP16_SAFE[1]}", f"{value:.3g}", entry.shard, entry.name)


@check(
    "V4",
    "No scale is a placeholder: float32's minimum, -1, or 1.0 throughout.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM takes it for a scale; weights or activations are off by orders of magnitude",
    remedy="calibrate or quantize again",
)
def scales_are_real(subject: Subject) -> Iterator[Fault]:
    by_kind: dict[str, list[tuple[TensorInfo, np.ndarray[Any, Any]]]] = defaultdict(list)
    for kind, _, entry, values in scales_of_kind(subject):
        by_kind[kind].append((entry, values))
        if np.isin(values, PLACEHOLDERS).any():
            found = f"{float(values[np.isin(values, PLACEHOLDERS)].flat[0]):.4g}"
            yield Fault("a scale", found, entry.shard, entry.name)
        if kind == "kv" and values.size and (values == 1.0).all():
            yield Fault("a calibrated KV scale", "1.0", entry.shard, entry.name, severity="warning")
    for kind in ("weight", "input"):
        if by_kind[kind] and all(values.size and (values == 1.0).all() for _, values in by_kind[kind]):
            yield Fault(f"{kind} scales from data", f"all {len(by_kind[kind])} are exactly 1.0")


@check(
    "V6",
    "Every scale unit uses the range: its largest code is 416 or 448 (absmax), and few weights are clipped.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM serves it; the largest weights are cut off",
    remedy="quantize again with an absmax scale",
)
def codes_use_the_range(subject: Subject) -> Iterator[Fault]:
    yield from _unused_range(subject)
    yield from _clipped(subject)


def _unused_range(subject: Subject) -> Iterator[Fault]:
    for name, seen in _measured(subject).tensors.items():
        members = sharing_group(subject, name.removesuffix(".weight"))
        if seen.spec is None or not seen.spec.minmax or members is None:
            continue
        tops = seen.tops if len(members) == 1 else _joint_tops(subject, members)
        low = (tops > 0) & (tops < NEAR_TOP)
        if low.any():
            value = code_value(int(tops[low].max()))
            yield Fault(
                "a code of at least 416 in every unit that is not zero",
                f"{int(low.sum())} of {low.size} units below, largest code {value:g}",
                seen.entry.shard,
                name,
                severity="warning",
                consequence="vLLM serves it, with fewer of the 8 bits than there are",
            )


def _joint_tops(subject: Subject, members: tuple[str, ...]) -> np.ndarray[Any, Any]:
    found = [_measured(subject).tensors.get(f"{member}.weight") for member in members]
    return np.array([max(int(seen.tops.max()) for seen in found if seen is not None)])


def _clipped(subject: Subject) -> Iterator[Fault]:
    """Source weights beyond scale * 448: at most 1 % of what shares a scale, and four. Needs the comparison."""
    comparisons = _measured(subject).comparisons
    for name, comparison in comparisons.items():
        members = sharing_group(subject, name.removesuffix(".weight")) or ()
        together = [c for m in members if (c := comparisons.get(f"{m}.weight")) is not None]
        if not comparison.clipped.any() or not together:
            continue
        counts = np.sum([c.clipped for c in together], axis=0)
        worst = int(np.argmax(counts))
        size = sum(c.unit_size for c in together)
        if counts.flat[worst] > max(4, 0.01 * size):
            found = f"{int(counts.flat[worst])} of {size} clipped in unit {worst}"
            yield Fault("source weights within scale * 448", found, comparison.entry.shard, name)


def code_value(magnitude: int) -> float:
    """What an E4M3 magnitude code stands for."""
    exponent, mantissa = magnitude >> 3, magnitude & 7
    return math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)


@check(
    "V9",
    "Per-tensor weight scales of a fused group are equal.",
    depth="values",
    severity="warning",
    needs=("scheme",),
    consequence="vLLM requantizes the group to its largest scale at load: a second rounding",
    remedy="quantize the group with one scale",
)
def fused_scales_are_equal(subject: Subject) -> Iterator[Fault]:
    assert subject.layout is not None
    for group in subject.layout.fused:
        found = {module: scale for module in group if (scale := weight_scale_of(subject, module)) is not None}
        if len(found) < 2 or any(scale.size != 1 or not _divides(scale) for scale in found.values()):
            continue
        values = {module: float(scale.flat[0]) for module, scale in found.items()}
        ratio = max(values.values()) / min(values.values())
        if ratio > 1:
            text = ", ".join(f"{module.rpartition('.')[2]} {value:.4g}" for module, value in values.items())
            parent = group[0].rpartition(".")[0]
            yield Fault(
                "one scale", f"{text} (ratio {ratio:.3g})", tensor=parent, severity="error" if ratio > 64 else None
            )


@check(
    "V10",
    "Static input scales of a fused group are equal, since its members see the same input.",
    depth="values",
    needs=("scheme",),
    consequence="vLLM takes the largest for all; in compressed-tensors experts it stops when w1 and w3 differ",
    remedy="calibrate again",
)
def fused_input_scales_are_equal(subject: Subject) -> Iterator[Fault]:
    assert subject.layout is not None
    scales = _measured(subject).scales
    for group in subject.layout.fused:
        values = {
            m: float(s.flat[0]) for m in group if (s := scales.get(f"{m}.input_scale")) is not None and s.size == 1
        }
        usable = [value for value in values.values() if math.isfinite(value) and value > 0]
        if len(usable) > 1 and max(usable) > min(usable) * 1.001:
            text = ", ".join(f"{module.rpartition('.')[2]} {value:.4g}" for module, value in values.items())
            yield Fault("one input_scale", text, tensor=group[0].rpartition(".")[0])
