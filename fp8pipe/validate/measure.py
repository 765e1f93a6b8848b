"""The one pass over the bytes: every tensor in tiles, each tile handed to whoever measures it.

In: a Subject whose headers are read. Out: `Measured`: per tensor what is not finite or unused, per scale what is
unusable, and with a source the comparison of `compare.py`, on the same tiles. What is kept of a tensor are counts and
first places, never arrays of its size: memory is bounded by tiles and the units of one tensor per thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.model.shards import SourceFiles
from fp8pipe.progress import Progress, ProgressEvent
from fp8pipe.validate.compare import KINDS, TILE, Comparison
from fp8pipe.validate.coverage import FLOATS, source_scale
from fp8pipe.validate.layout import KV_SCALES, Piece, split_name
from fp8pipe.validate.scheme import Spec, is_block, quantization_config
from fp8pipe.validate.shapes import FLOAT_SCALES
from fp8pipe.validate.shelf import Shelf
from fp8pipe.validate.units import FLOAT_BITS, Array, is_coarse, magnitudes, scale_values, unit_rows, unit_tops, unpack

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

TILE_BYTES = 1 << 18
"""Bytes of codes in hand at a time: with their float32 work they stay near a core's L2; 1 << 20 is half as fast."""
MAX_ROW_BYTES = 1 << 26
"""A row (times the block's rows) longer than this belongs to no Linear: the tensor is not measured by units."""
PANEL_BYTES = 1 << 24
"""Source bytes in hand where an expert's matrix lies transposed: short runs make slow reads."""
KEPT_VALUES = 512
"""Scales of at most so many values are kept: those per tensor, per expert, per head."""

SMALLEST = {"F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14, "F8_E4M3": 2.0**-9, "U8": 0.0}
"""The least a scale may be: a normal number, but in NVFP4 and MX any."""
PLACEHOLDERS = (float(np.finfo(np.float32).min), -1.0)
"""What vLLM and old tools put where a scale is yet to come."""


# ---------------------------------------------------------------------------------------------- what is kept


@dataclass(slots=True)
class Magnitudes:
    """One tensor's largest magnitudes, reduced."""

    entry: TensorInfo
    spec: Spec | None
    """How it is quantized; None for tensors that are not."""
    top: int = 0
    """Largest magnitude, as integer."""
    nonfinite: int = 0
    """Elements that are NaN or Inf."""
    first_nonfinite: int = 0
    """Flat index of the first."""
    units: int = 0
    low: int = 0
    """Units that are not zero and whose largest code is below the format's top."""
    largest_low: int = 0
    """The largest magnitude among those."""

    @property
    def is_zero(self) -> bool:
        return self.entry.nbytes > 0 and self.top == 0


@dataclass(slots=True)
class Scale:
    """One scale tensor, reduced."""

    entry: TensorInfo
    kind: str
    """weight, global, input or kv."""
    values: Array | None
    """float32, in its own shape, where they are few."""
    unusable: int = 0
    """Values that are not finite, not above zero, or too small; placeholders not counted."""
    first_unusable: tuple[int, float] | None = None
    """Flat index and value."""
    zeros: int = 0
    placeholder: float | None = None
    all_one: bool = False

    @property
    def value(self) -> float | None:
        """The one value of a scalar."""
        return float(self.values.flat[0]) if self.values is not None and self.values.size == 1 else None


@dataclass
class Measured:
    """What the pass over the data saw."""

    tensors: dict[str, Magnitudes] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Quantized weights against the source."""
    altered: dict[str, int] = field(default_factory=dict)
    """Tensors that should equal the source, with the byte offset of the first difference."""
    uncompared: dict[str, str] = field(default_factory=dict)
    """Quantized weights that nothing in the source was held against, with the source's dtype."""
    bytes_read: int = 0

    def in_order_of(self, entries: Iterable[TensorInfo]) -> Measured:
        """The same, in the order of the files and not in that in which threads finished."""
        place = {entry.name: number for number, entry in enumerate(entries)}
        return Measured(
            _sorted(self.tensors, place),
            _sorted(self.scales, place),
            _sorted(self.comparisons, place),
            _sorted(self.altered, place),
            _sorted(self.uncompared, place),
            self.bytes_read,
        )


T = TypeVar("T")


def _sorted(part: dict[str, T], place: dict[str, int]) -> dict[str, T]:
    return dict(sorted(part.items(), key=lambda item: place[item[0]]))


# ---------------------------------------------------------------------------------------------- the pass


def measure(subject: Subject, *, with_source: bool, progress: Progress) -> Measured:
    """Read every byte of the checkpoint once, and of the source once if asked for; one thread per core."""
    entries = sorted(subject.shelf.tensors.values(), key=lambda entry: (entry.shard, entry.begin))
    with ExitStack() as stack:
        theirs = _open(subject.source, stack) if with_source and subject.source else None
        reader = Reader(subject, _open(subject.shelf, stack), theirs)
        pool = _pool(stack)
        total, done = sum(entry.nbytes for entry in entries), 0
        for entry in _in_parallel(pool, reader.read, entries):
            done += entry.nbytes
            progress(ProgressEvent("validate", done, total, "B", entry.name))
    return reader.measured.in_order_of(entries)


def _pool(stack: ExitStack) -> ThreadPoolExecutor:
    """A thread per core, each alone in its torch operations: tiles are too small to be shared between threads."""
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    cores = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(cores, "validate", initializer=partial(torch.set_num_threads, 1))
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool


def _in_parallel(pool: ThreadPoolExecutor, read: Any, entries: list[TensorInfo]) -> Iterator[TensorInfo]:
    """Each entry when it has been read; a few are under way, so that progress is told and an error ends it soon."""
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


def _open(shelf: Shelf, stack: ExitStack) -> SourceFiles:
    opened = SourceFiles(_root(shelf), stack)
    for name in shelf.shards():
        opened.open(name)
    return opened


def _root(shelf: Shelf) -> Path:
    assert shelf.place.root is not None, "values are read from a folder"
    return shelf.place.root


class Reader:
    """Reads tensors in tiles and hands each tile to whoever measures it."""

    def __init__(self, subject: Subject, ours: SourceFiles, theirs: SourceFiles | None) -> None:
        self.subject = subject
        self.measured = Measured()
        self._ours = ours
        self._theirs = theirs
        self._counting = Lock()

    def read(self, entry: TensorInfo) -> None:
        """Measure one tensor; integers have nothing to measure but are compared with the source."""
        spec = self.subject.spec_of_weight(entry)
        if spec is not None and _is_sound(entry, spec):
            self._read_weight(entry, spec)
            return
        if (kind := self._scale_kind(entry)) is not None:
            self._read_scale(entry, kind)
            return
        self._read_other(entry)

    # ------------------------------------------------------------------------------------------ weights

    def _read_weight(self, entry: TensorInfo, spec: Spec) -> None:
        module = split_name(entry.name)[0]
        shape = spec.unpacked(entry.shape)
        scale = self._scale_of(module, spec, shape)
        twin = self._twin(module, shape)
        comparison = None
        is_copy = isinstance(twin, _Dequantized) and scale is not None and scale.equal(twin.scales)
        if scale is not None and twin is not None and not is_copy:
            comparison = Comparison(entry, twin.dtype, spec, shape)
        elif twin is None and self._theirs is not None:
            self._note_uncompared(entry, module)
        seen = Magnitudes(entry, spec)
        sign = 8 if spec.format.codes.per_byte == 2 else 0x80
        tops: list[torch.Tensor] = []
        for row, codes in self._code_tiles(entry, spec, TILE_BYTES if comparison is None else TILE):
            tile = torch.from_numpy(codes)
            part = unit_tops(tile & (sign - 1), spec)
            if sign == 0x80 and int(part.max()) == 0x7F:
                _note_nonfinite(seen, (tile & 0x7F).view(-1) == 0x7F, row * shape[1])
            units = None if scale is None else scale.rows(row, len(codes))
            seen.top = max(seen.top, int(part.max()))
            tops.append(part) if spec.strategy == "tensor" else _note_units(seen, part, units)
            if comparison is not None and twin is not None and units is not None:
                comparison.add(row, tile, twin.rows(row, len(codes)), units)
            elif is_copy and isinstance(twin, _Dequantized):
                self._note_altered(entry, row * shape[1], codes.reshape(-1), twin.codes(row, len(codes)))
        if spec.strategy == "tensor" and tops:
            _note_units(seen, torch.stack(tops).amax(0), scale.rows(0, 1) if scale is not None else None)
        self.measured.tensors[entry.name] = seen
        if comparison is not None:
            self.measured.comparisons[entry.name] = comparison.finish(scale.rows(0, shape[0]) if scale else None)

    def _code_tiles(self, entry: TensorInfo, spec: Spec, size: int) -> Iterator[tuple[int, Array]]:
        """(first row, codes [rows, columns]) of whole bands, about `size` bytes."""
        band = spec.block[0] if spec.block else 1
        rows = max(1, size // (entry.shape[1] * band)) * band
        for row in range(0, entry.shape[0], rows):
            count = min(rows, entry.shape[0] - row)
            data = self._piece(self._ours, entry, row * entry.shape[1], count * entry.shape[1])
            yield row, unpack(data, count, spec.format.codes)

    def _scale_of(self, module: str, spec: Spec, shape: tuple[int, int]) -> _Scales | None:
        """The module's scales, None when they are missing, misshapen or do not divide."""
        tensors = self.subject.shelf.tensors
        entry = tensors.get(f"{module}.{spec.scale}")
        if entry is None or entry.dtype not in spec.format.scale_dtypes or entry.shape not in spec.scale_shapes(shape):
            return None
        whole = 1.0
        if spec.global_scale is not None:
            other = tensors.get(f"{module}.{spec.global_scale}")
            if other is None or other.dtype not in FLOAT_SCALES or other.shape not in ((1,), ()):
                return None
            value = float(scale_values(self._piece(self._ours, other, 0, other.nbytes), other.dtype)[0])
            if not 0 < value < float("inf"):
                return None
            whole = value
        scales = _Scales(self, entry, spec, spec.units(shape), whole)
        return scales if scales.divide() else None

    # ------------------------------------------------------------------------------------------ scales

    def _scale_kind(self, entry: TensorInfo) -> str | None:
        """Which kind of scale a tensor is; None for what is none, or has another dtype than a scale may have."""
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
            data = self._piece(self._ours, entry, offset, min(TILE_BYTES, entry.nbytes - offset))
            _note_scales(scale, scale_values(data, entry.dtype), offset // item)
            if few:
                scale.values = scale_values(data, entry.dtype).numpy().reshape(entry.shape)
        self.measured.scales[entry.name] = scale

    # ------------------------------------------------------------------------------------------ all others

    def _read_other(self, entry: TensorInfo) -> None:
        expected = self._expected(entry)
        is_float = entry.dtype in FLOAT_BITS
        seen = Magnitudes(entry, None)
        for offset in range(0, entry.nbytes, TILE_BYTES) if is_float or expected is not None else ():
            size = min(TILE_BYTES, entry.nbytes - offset)
            tile = self._piece(self._ours, entry, offset, size)
            if expected is not None and entry.name not in self.measured.altered:
                self._note_altered(entry, offset, tile, expected(offset, size))
            if is_float:
                _note_floats(seen, magnitudes(tile, entry.dtype), offset // ITEM_BYTES[entry.dtype])
        if is_float and entry.nbytes:
            self.measured.tensors[entry.name] = seen

    def _expected(self, entry: TensorInfo) -> Callable[[int, int], Array] | None:
        """What the tensor's bytes (offset, size) must be; None where they are not known, or another check speaks."""
        source, module = self.subject.source, split_name(entry.name)[0]
        if self._theirs is None or source is None or (twin := source.tensors.get(entry.name)) is None:
            return None
        if twin.shape != entry.shape or (module in self.subject.specs and not self._is_left(entry)):
            return None  # S2's or K5's
        if twin.dtype == entry.dtype:
            return partial(self.source, twin)
        known = self._dequantized(twin) if entry.dtype in KINDS else None
        return partial(known.cast, KINDS[entry.dtype]) if known is not None else None  # else S4's or K4's

    def _is_left(self, entry: TensorInfo) -> bool:
        """Floats where the config would have codes and need not."""
        module, leaf = split_name(entry.name)
        layout = self.subject.layout
        is_free = layout is not None and (module in layout.optional or module in layout.towers)
        return leaf != "weight" or (is_free and entry.dtype in FLOATS)

    def _note_altered(self, entry: TensorInfo, begin: int, ours: Array, theirs: Array) -> None:
        if entry.name not in self.measured.altered and not np.array_equal(ours, theirs):
            self.measured.altered[entry.name] = begin + int(np.flatnonzero(ours != theirs)[0])

    def _note_uncompared(self, entry: TensorInfo, module: str) -> None:
        """Only what other checks do not speak of: S2 does of shapes, K8 of weights that the source does not have."""
        source, shape = self.subject.source, self.subject.source_shape(module)
        spec = self.subject.specs[module]
        if source is not None and shape is not None and spec.stored(shape) == entry.shape:
            layout = self.subject.layout
            piece = layout.pieces.get(module) if layout else None
            self.measured.uncompared[entry.name] = source.tensors[piece.tensor if piece else f"{module}.weight"].dtype

    # ------------------------------------------------------------------------------------------ bytes

    def _twin(self, module: str, shape: tuple[int, int]) -> _Twin | _Dequantized | None:
        """The source's weight of a module, if it has the same shape and values that are known."""
        source, layout = self.subject.source, self.subject.layout
        if self._theirs is None or source is None or layout is None or self.subject.source_shape(module) != shape:
            return None
        piece = layout.pieces.get(module)
        info = source.tensors.get(piece.tensor if piece else f"{module}.weight")
        if info is not None and info.dtype in FLOAT_SCALES:
            return _Twin(self, info, piece)
        return self._dequantized(info) if info is not None and piece is None else None

    def _dequantized(self, info: TensorInfo) -> _Dequantized | None:
        """An FP8 weight of the source with its scales; None when they are missing, or in a form that is not known."""
        scale = source_scale(self.subject, info.name)
        if scale is None or scale.dtype not in FLOAT_SCALES:
            return None
        block: Any = (quantization_config(self.subject.source_config or {}) or {}).get("weight_block_size")
        units = _source_units(info, scale, (block[0], block[1]) if is_block(block) else None)
        return _Dequantized(self, info, scale, *units) if units is not None else None

    def _source(self) -> SourceFiles:
        assert self._theirs is not None
        return self._theirs

    def _piece(self, files: SourceFiles, entry: TensorInfo, offset: int, size: int) -> Array:
        return self._fill(np.empty(size, np.uint8), files, entry, offset)

    def _fill(self, buffer: Array, files: SourceFiles, entry: TensorInfo, offset: int) -> Array:
        files.read_into(entry.shard, entry.begin + offset, buffer.data, entry.name)
        with self._counting:
            self.measured.bytes_read += len(buffer)
        return buffer

    def ours(self, entry: TensorInfo, offset: int, size: int) -> Array:
        """Bytes of a tensor of the checkpoint."""
        return self._piece(self._ours, entry, offset, size)

    def source(self, entry: TensorInfo, offset: int, size: int) -> Array:
        """Bytes of a tensor of the source."""
        return self._piece(self._source(), entry, offset, size)


class _Scales:
    """Multipliers of one weight, by rows of the unit grid; those of groups are read as they are needed."""

    def __init__(self, reader: Reader, entry: TensorInfo, spec: Spec, grid: tuple[int, ...], whole: float) -> None:
        self._reader, self._entry, self._spec, self._grid, self._global = reader, entry, spec, grid, whole
        self._held: torch.Tensor | None = None

    def divide(self) -> bool:
        """Whether all are finite and above zero; of groups this is asked tile by tile."""
        if self._spec.strategy == "group":
            return True
        self._held = scale_values(self._reader.ours(self._entry, 0, self._entry.nbytes), self._entry.dtype)
        self._held = self._held.reshape(self._grid)
        return bool(self._held.numel() and torch.isfinite(self._held).all() and (self._held > 0).all())

    def equal(self, values: torch.Tensor) -> bool:
        """Whether these are the multipliers, whatever their shape; never of groups."""
        return self._held is not None and torch.equal(self._held.reshape(-1), values.reshape(-1))

    def rows(self, row: int, rows: int) -> torch.Tensor:
        """float32 multipliers of the units of these rows of the weight; groups that do not divide are NaN."""
        if self._held is not None:
            return self._held[unit_rows(self._spec, row, rows)]
        width = self._grid[1]
        data = self._reader.ours(self._entry, row * width, rows * width)
        values = scale_values(data, self._entry.dtype).reshape(rows, width)
        values = torch.where((values > 0) & torch.isfinite(values), values, torch.nan)
        return values / self._global if self._spec.global_divides else values * self._global


class _Twin:
    """A weight [out, in] of the source, by rows: a tensor of its own, or a part of one with all experts."""

    def __init__(self, reader: Reader, info: TensorInfo, piece: Piece | None) -> None:
        self.info = info
        self.dtype = info.dtype
        """Of the bytes."""
        self._reader, self._piece = reader, piece
        self._item = ITEM_BYTES[info.dtype]
        self._panel: tuple[int, Array] | None = None

    def rows(self, row: int, rows: int) -> Array:
        """Bytes of these rows, flat."""
        piece = self._piece
        if piece is None:
            run = self.info.shape[1] * self._item
            return self._reader.source(self.info, row * run, rows * run)
        first = piece.start + piece.step * row
        if piece.transposed:
            return self._columns(piece, first, first + piece.step * (rows - 1) + 1)
        run = piece.columns * self._item
        height = self.info.shape[1]
        begin = (piece.expert * height + first) * run
        data = self._reader.source(self.info, begin, (piece.step * (rows - 1) + 1) * run)
        return data if piece.step == 1 else np.ascontiguousarray(data.reshape(-1, run)[:: piece.step]).reshape(-1)

    def _columns(self, piece: Piece, first: int, last: int) -> Array:
        """Columns first, first + step, ... last of a matrix [in, out], as rows."""
        if self._panel is None or not self._panel[0] <= first < last <= self._panel[0] + self._panel[1].shape[1]:
            self._panel = (first, self._read_panel(piece, first, last))
        left, panel = self._panel
        part = panel[:, first - left : last - left : piece.step]  # [in, rows, bytes of an item]
        return np.ascontiguousarray(part.transpose(1, 0, 2)).reshape(-1)

    def _read_panel(self, piece: Piece, first: int, last: int) -> Array:
        width = self.info.shape[2]
        last = min(width, max(last, first + PANEL_BYTES // (piece.columns * self._item)))
        base = piece.expert * piece.columns * width
        runs = [
            self._reader.source(self.info, (base + row * width + first) * self._item, (last - first) * self._item)
            for row in range(piece.columns)
        ]
        return np.stack(runs).reshape(piece.columns, last - first, self._item)


class _Dequantized:
    """A weight [out, in] of a source that is FP8 itself, by rows: codes times scales, in float32."""

    dtype = "F32"

    def __init__(
        self, reader: Reader, info: TensorInfo, scale: TensorInfo, grid: tuple[int, int], block: tuple[int, int]
    ) -> None:
        self._reader, self._info, self._block = reader, info, block
        self.scales = scale_values(reader.source(scale, 0, scale.nbytes), scale.dtype).reshape(grid)

    def codes(self, row: int, rows: int) -> Array:
        """Bytes of these rows as they are stored, flat."""
        width = self._info.shape[1]
        return self._reader.source(self._info, row * width, rows * width)

    def rows(self, row: int, rows: int) -> Array:
        """Bytes of the float32 values of these rows, flat."""
        return self._values(row, rows).view(torch.uint8).reshape(-1).numpy()

    def cast(self, dtype: torch.dtype, offset: int, size: int) -> Array:
        """Bytes from `offset` on of the whole weight in another dtype, as it is kept unquantized."""
        run = self._info.shape[1] * dtype.itemsize
        first, last = offset // run, -(-(offset + size) // run)
        whole = self._values(first, last - first).to(dtype).view(torch.uint8).reshape(-1).numpy()
        return whole[offset - first * run :][:size]

    def _values(self, row: int, rows: int) -> torch.Tensor:
        width = self._info.shape[1]
        codes = torch.from_numpy(self.codes(row, rows)).view(torch.float8_e4m3fn).view(rows, width)
        high, wide = self._block
        units = self.scales[torch.arange(row, row + rows) // high]
        return codes.float().mul_(units.repeat_interleave(wide, 1)[:, :width])


def _source_units(
    weight: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(grid of units, rows and columns of one) of an FP8 weight [out, in]: a whole weight, a row, a block."""
    rows, columns = weight.shape
    if scale.shape in ((), (1,), (1, 1)):
        return (1, 1), (max(1, rows), max(1, columns))
    if scale.shape in ((rows,), (rows, 1)) and (block is None or columns > block[1]):
        return (rows, 1), (1, max(1, columns))
    if block is None or scale.shape != (grid := (-(-rows // block[0]), -(-columns // block[1]))):
        return None
    return grid, block


# ---------------------------------------------------------------------------------------------- noting


def _is_sound(entry: TensorInfo, spec: Spec) -> bool:
    """Whether codes can be read as a matrix; S1 and S2 speak of the others."""
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
    """Units whose largest code is low. Without a usable scale nobody knows which they are; those of NVFP4 whose scale
    is too small to be exact are left out."""
    assert seen.spec is not None
    if scale is None:
        return
    low = (tops > 0) & (tops < seen.spec.format.top)
    if seen.spec.format.name == "NVFP4":
        low &= ~is_coarse(scale)
    seen.units += tops.numel()
    if low.any():
        seen.low += int(low.sum())
        seen.largest_low = max(seen.largest_low, int(tops[low].max()))


def _note_scales(scale: Scale, values: torch.Tensor, begin: int) -> None:
    held_by_vllm = values == PLACEHOLDERS[0]
    if scale.kind != "global":
        held_by_vllm |= values == PLACEHOLDERS[1]
    if held_by_vllm.any():
        scale.placeholder = float(values[held_by_vllm][0])
    zero = (values == 0) & (scale.entry.dtype == "F8_E4M3")
    bad = (~(values >= SMALLEST[scale.entry.dtype]) | torch.isinf(values)) & ~held_by_vllm & ~zero
    scale.zeros += int(zero.sum())
    if bad.any():
        if scale.first_unusable is None:
            first = int(torch.nonzero(bad)[0])
            scale.first_unusable = (begin + first, float(values[first]))
        scale.unusable += int(bad.sum())
    scale.all_one = scale.all_one and bool((values == 1).all())
