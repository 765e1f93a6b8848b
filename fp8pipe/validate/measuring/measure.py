"""The one pass over the bytes: reads every tensor in tiles and notes what the checks of values ask for.

Memory is bounded by tiles and by the scale units of one tensor per thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from fp8pipe.model.fp8_source import as_block, grid_of
from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.progress import Progress, ProgressEvent
from fp8pipe.validate.meaning.config import quantization_config
from fp8pipe.validate.meaning.formats import Spec
from fp8pipe.validate.meaning.names import FLOAT_SCALES, FLOATS, KV_SCALES, split_name
from fp8pipe.validate.measured import Array, Magnitudes, Measured, Scale
from fp8pipe.validate.measuring.compare import KINDS, TILE, Comparer
from fp8pipe.validate.measuring.units import (
    FAINT_SCALES,
    FLOAT_BITS,
    is_coarse,
    magnitudes,
    scale_values,
    unit_tops,
    unpack,
)
from fp8pipe.validate.measuring.weights import Fp8Weight, PlainWeight, Scales, TensorBytes
from fp8pipe.validate.subject import Subject

TILE_BYTES = 1 << 18
"""Bytes of codes read at a time: with their float32 work they stay near a core's L2; 1 << 20 is half as fast."""
MAX_ROW_BYTES = 1 << 26
"""A row (times the block's rows) longer than this belongs to no Linear: the tensor is not measured by units."""
KEPT_VALUES = 512
"""Scales of at most so many values are kept: those per tensor, per expert, per head."""

SMALLEST = {"F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14, "F8_E4M3": 2.0**-9, "U8": 0.0}
"""The smallest usable scale by dtype: the smallest normal number; for F8_E4M3 also subnormals; no limit for U8
exponents."""
PLACEHOLDERS = (float(np.finfo(np.float32).min), -1.0)
"""What vLLM and old tools write where a scale is yet to come."""


def measure(subject: Subject, *, with_source: bool, progress: Progress) -> Measured:
    """Read every byte of the checkpoint once, and of the source once if asked for; one thread per core."""
    entries = sorted(subject.files.tensors.values(), key=lambda entry: (entry.shard, entry.begin))
    with ExitStack() as stack:
        ours = TensorBytes(subject.files, stack)
        theirs = TensorBytes(subject.source, stack) if with_source else None
        reader = _Reader(subject, ours, theirs)
        pool = _pool(stack)
        total, done = sum(entry.nbytes for entry in entries), 0
        for entry in _in_parallel(pool, reader.read, entries):
            done += entry.nbytes
            progress(ProgressEvent("validate", done, total, "B", entry.name))
    measured = reader.measured.in_order_of(entries)
    measured.bytes_read = ours.count + (theirs.count if theirs else 0)
    return measured


def _pool(stack: ExitStack) -> ThreadPoolExecutor:
    """A thread per core, each with single-threaded torch: tiles are too small to be shared between threads."""
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    cores = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(cores, "validate", initializer=partial(torch.set_num_threads, 1))
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool


def _in_parallel(pool: ThreadPoolExecutor, read: Any, entries: list[TensorInfo]) -> Iterator[TensorInfo]:
    """Each entry when it has been read. Only a few are submitted at a time, so that an error ends the pass soon."""
    waiting = iter(entries)
    running: dict[Future[None], TensorInfo] = {}
    while True:
        for entry in islice(waiting, 16 - len(running)):
            running[pool.submit(read, entry)] = entry
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            future.result()
            yield running.pop(future)


class _Reader:
    """Reads tensors and fills `measured`."""

    def __init__(self, subject: Subject, ours: TensorBytes, theirs: TensorBytes | None) -> None:
        """`theirs`: None if nothing is compared."""
        self.subject = subject
        self.measured = Measured()
        self._ours = ours
        self._theirs = theirs

    def read(self, entry: TensorInfo) -> None:
        """Measure one tensor."""
        spec = self.subject.spec_of_weight(entry)
        if spec is not None and _is_measurable(entry, spec):
            self._read_weight(entry, spec)
        elif (kind := self._scale_kind(entry)) is not None:
            self._read_scale(entry, kind)
        else:
            self._read_other(entry)

    # ------------------------------------------------------------------------------------------ weights

    def _read_weight(self, entry: TensorInfo, spec: Spec) -> None:
        module = split_name(entry.name)[0]
        shape = spec.unpacked(entry.shape)
        scale = self._scale_of(module, spec, shape)
        twin = self._twin(module, shape)
        comparer = None
        is_copy = isinstance(twin, Fp8Weight) and scale is not None and scale.equal(twin.scales)
        if scale is not None and twin is not None and not is_copy:
            comparer = Comparer(entry, twin.dtype, spec, shape)
        elif twin is None and self._theirs is not None:
            self._note_uncompared(entry, module)
        seen = Magnitudes(entry, spec)
        sign = 8 if spec.format.codes.per_byte == 2 else 0x80
        tops: list[torch.Tensor] = []
        for row, codes in self._code_tiles(entry, spec, TILE_BYTES if comparer is None else TILE):
            tile = torch.from_numpy(codes)
            part = unit_tops(tile & (sign - 1), spec)
            if sign == 0x80 and int(part.max()) == 0x7F:
                _note_nonfinite(seen, (tile & 0x7F).view(-1) == 0x7F, row * shape[1])
            units = None if scale is None else scale.rows(row, len(codes))
            seen.top = max(seen.top, int(part.max()))
            tops.append(part) if spec.strategy == "tensor" else _note_units(seen, part, units)
            if comparer is not None and twin is not None and units is not None:
                comparer.add(row, tile, twin.rows(row, len(codes)), units)
            elif is_copy and isinstance(twin, Fp8Weight):
                self._note_altered(entry, row * shape[1], codes.reshape(-1), twin.codes(row, len(codes)))
        if spec.strategy == "tensor" and tops:
            _note_units(seen, torch.stack(tops).amax(0), scale.rows(0, 1) if scale is not None else None)
        self.measured.tensors[entry.name] = seen
        if comparer is not None:
            self.measured.comparisons[entry.name] = comparer.finish(scale.rows(0, shape[0]) if scale else None)

    def _code_tiles(self, entry: TensorInfo, spec: Spec, size: int) -> Iterator[tuple[int, Array]]:
        """(first row, codes [rows, columns]) of whole bands, about `size` bytes."""
        band = spec.block[0] if spec.block else 1
        rows = max(1, size // (entry.shape[1] * band)) * band
        for row in range(0, entry.shape[0], rows):
            count = min(rows, entry.shape[0] - row)
            data = self._ours.read(entry, row * entry.shape[1], count * entry.shape[1])
            yield row, unpack(data, count, spec.format.codes)

    def _scale_of(self, module: str, spec: Spec, shape: tuple[int, int]) -> Scales | None:
        """The module's scales; None if they are missing, misshapen or cannot divide."""
        tensors = self.subject.files.tensors
        entry = tensors.get(f"{module}.{spec.scale}")
        if entry is None or entry.dtype not in spec.format.scale_dtypes or entry.shape not in spec.scale_shapes(shape):
            return None
        global_scale = 1.0
        if spec.global_scale is not None:
            other = tensors.get(f"{module}.{spec.global_scale}")
            if other is None or other.dtype not in FLOAT_SCALES or other.shape not in ((1,), ()):
                return None
            global_scale = float(scale_values(self._ours.read(other, 0, other.nbytes), other.dtype)[0])
            if not 0 < global_scale < float("inf"):
                return None
        scales = Scales(self._ours, entry, spec, spec.units(shape), global_scale)
        return scales if scales.can_divide else None

    # ------------------------------------------------------------------------------------------ scales

    def _scale_kind(self, entry: TensorInfo) -> str | None:
        """Which kind of scale a tensor is; None if it is none, or has another dtype than a scale may have."""
        module, leaf = split_name(entry.name)
        spec = self.subject.specs.get(module)
        if leaf in KV_SCALES:
            return "kv" if entry.dtype in FLOAT_SCALES else None
        if spec is None or leaf not in (*spec.companions, *spec.spare):
            return None
        if leaf == spec.scale:
            return "weight" if entry.dtype in spec.format.scale_dtypes else None
        if entry.dtype not in FLOAT_SCALES:
            return None
        return "global" if leaf == spec.global_scale else "input"

    def _read_scale(self, entry: TensorInfo, kind: str) -> None:
        item = ITEM_BYTES[entry.dtype]
        few = entry.nbytes // item <= KEPT_VALUES
        scale = Scale(entry, kind, None, all_one=entry.nbytes > 0)
        for offset in range(0, entry.nbytes, TILE_BYTES):
            values = scale_values(self._ours.read(entry, offset, min(TILE_BYTES, entry.nbytes - offset)), entry.dtype)
            _note_scales(scale, values, offset // item)
            if kind == "weight" and self.subject.specs[split_name(entry.name)[0]].format.by_powers:
                _note_uneven(scale, values, offset // item)
            if few:
                scale.values = values.numpy().reshape(entry.shape)
        self.measured.scales[entry.name] = scale

    # ------------------------------------------------------------------------------------------ all others

    def _read_other(self, entry: TensorInfo) -> None:
        """Integers have nothing to measure, but are compared with the source."""
        expected = self._expected(entry)
        is_float = entry.dtype in FLOAT_BITS
        seen = Magnitudes(entry, None)
        for offset in range(0, entry.nbytes, TILE_BYTES) if is_float or expected is not None else ():
            size = min(TILE_BYTES, entry.nbytes - offset)
            tile = self._ours.read(entry, offset, size)
            if expected is not None and entry.name not in self.measured.altered:
                self._note_altered(entry, offset, tile, expected(offset, size))
            if is_float:
                _note_floats(seen, magnitudes(tile, entry.dtype), offset // ITEM_BYTES[entry.dtype])
        if is_float and entry.nbytes:
            self.measured.tensors[entry.name] = seen

    def _expected(self, entry: TensorInfo) -> Callable[[int, int], Array] | None:
        """What the bytes (offset, size) of an unquantized tensor must be; None if that is not known."""
        if self._theirs is None or (twin := self.subject.source.tensors.get(entry.name)) is None:
            return None
        is_quantized = split_name(entry.name)[0] in self.subject.specs and not self._is_left(entry)
        if twin.shape != entry.shape or is_quantized:
            return None
        if twin.dtype == entry.dtype:
            return partial(self._theirs.read, twin)
        known = self._dequantized(twin) if entry.dtype in KINDS else None
        return partial(known.cast, KINDS[entry.dtype]) if known is not None else None

    def _is_left(self, entry: TensorInfo) -> bool:
        """Whether a tensor of a quantized module may stay as it is in the source."""
        module, leaf = split_name(entry.name)
        return leaf != "weight" or (module in self.subject.layout.may_stay and entry.dtype in FLOATS)

    def _note_altered(self, entry: TensorInfo, begin: int, ours: Array, theirs: Array) -> None:
        if entry.name not in self.measured.altered and not np.array_equal(ours, theirs):
            self.measured.altered[entry.name] = begin + int(np.flatnonzero(ours != theirs)[0])

    def _note_uncompared(self, entry: TensorInfo, module: str) -> None:
        """Note a weight that the source has in the same shape, but in a form whose values are not known."""
        shape = self.subject.source_shape(module)
        if shape is not None and self.subject.specs[module].stored(shape) == entry.shape:
            piece = self.subject.layout.pieces.get(module)
            twin = self.subject.source.tensors[piece.tensor if piece else f"{module}.weight"]
            self.measured.uncompared[entry.name] = twin.dtype

    # ------------------------------------------------------------------------------------------ the source

    def _twin(self, module: str, shape: tuple[int, int]) -> PlainWeight | Fp8Weight | None:
        """The source's weight of a module, if it has the same shape and values that are known."""
        if self._theirs is None or self.subject.source_shape(module) != shape:
            return None
        piece = self.subject.layout.pieces.get(module)
        info = self.subject.source.tensors.get(piece.tensor if piece else f"{module}.weight")
        if info is not None and info.dtype in FLOAT_SCALES:
            return PlainWeight(self._theirs, info, piece)
        return self._dequantized(info) if info is not None and piece is None else None

    def _dequantized(self, info: TensorInfo) -> Fp8Weight | None:
        """An FP8 weight of the source with its scales; None if they are missing or cannot be understood."""
        scale = self.subject.source_scale(info.name)
        if scale is None or scale.dtype not in FLOAT_SCALES or self._theirs is None:
            return None
        settings = quantization_config(self.subject.source_config or {}) or {}
        rows, columns = info.shape
        grid = grid_of((rows, columns), scale.shape, as_block(settings.get("weight_block_size")))
        return Fp8Weight(self._theirs, info, scale, grid) if grid is not None else None


# ---------------------------------------------------------------------------------------------- noting


def _is_measurable(entry: TensorInfo, spec: Spec) -> bool:
    """Whether a weight can be read as a matrix of codes."""
    is_matrix = entry.dtype == spec.format.codes.dtype and len(entry.shape) == 2 and 0 not in entry.shape
    return is_matrix and entry.shape[1] * (spec.block[0] if spec.block else 1) <= MAX_ROW_BYTES


def _note_floats(seen: Magnitudes, tile: torch.Tensor, begin: int) -> None:
    top = int(tile.max())
    seen.top = max(seen.top, top)
    limit = FLOAT_BITS[seen.entry.dtype][2]
    if top >= limit:
        _note_nonfinite(seen, tile >= limit, begin)


def _note_nonfinite(seen: Magnitudes, bad: torch.Tensor, begin: int) -> None:
    if not seen.nonfinite:
        seen.first_nonfinite = begin + int(torch.nonzero(bad)[0])
    seen.nonfinite += int(bad.sum())


def _note_units(seen: Magnitudes, tops: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Note units whose largest code is low. Without usable scales the units are unknown; NVFP4's units whose
    scale is too small to be exact are left out."""
    assert seen.spec is not None
    if scale is None:
        return
    low = (tops > 0) & (tops < seen.spec.format.top) & ~((scale >= FAINT_SCALES[0]) & (scale <= FAINT_SCALES[1]))
    if seen.spec.format.name == "NVFP4":
        low &= ~is_coarse(scale)
    seen.units += tops.numel()
    if low.any():
        seen.low += int(low.sum())
        seen.largest_low = max(seen.largest_low, int(tops[low].max()))


def _note_scales(scale: Scale, values: torch.Tensor, begin: int) -> None:
    placeholder = values == PLACEHOLDERS[0]
    if scale.kind != "global":
        placeholder |= values == PLACEHOLDERS[1]
    if placeholder.any():
        scale.placeholder = float(values[placeholder][0])
    zero = (values == 0) & (scale.entry.dtype == "F8_E4M3")
    bad = (~(values >= SMALLEST[scale.entry.dtype]) | torch.isinf(values)) & ~placeholder & ~zero
    scale.zeros += int(zero.sum())
    if bad.any():
        if scale.first_unusable is None:
            first = int(torch.nonzero(bad)[0])
            scale.first_unusable = (begin + first, float(values[first]))
        scale.unusable += int(bad.sum())
    scale.all_one = scale.all_one and bool((values == 1).all())
    scale.largest = max(scale.largest, float(torch.where(torch.isfinite(values), values, 0).max()))


def _note_uneven(scale: Scale, values: torch.Tensor, begin: int) -> None:
    """Note usable values that are no power of two."""
    uneven = (values > 0) & torch.isfinite(values) & (torch.frexp(values).mantissa != 0.5)
    if uneven.any():
        if scale.first_uneven is None:
            first = int(torch.nonzero(uneven)[0])
            scale.first_uneven = (begin + first, float(values[first]))
        scale.uneven += int(uneven.sum())
