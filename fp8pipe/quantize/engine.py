"""Weights through numerics into their planned bytes, stripe by stripe.

A *unit* is what shares a range: a fused group under per-tensor scales, else one weight. A *stripe* is a run of rows
of one weight, about 4 MB: read by position, measured, encoded, written by position. Scales per row or block need only
their stripe, so its bytes are read once; a scale per tensor needs all stripes of its unit measured before the first
is encoded, so they are read twice. Memory is one stripe and its codes per thread, whatever the size of tensors and
models."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fp8pipe import numerics
from fp8pipe.checkpoint import ITEM_BYTES, OutputShard, SourceFiles, TensorInfo
from fp8pipe.errors import NonFiniteWeight
from fp8pipe.plan import OutputTensor, Plan, Slice
from fp8pipe.progress import Progress, ProgressEvent
from fp8pipe.quantize.journal import Journal
from fp8pipe.quantize.pool import Pool, Task

STRIPE_BYTES = 4 << 20
"""Source bytes of a stripe. Small enough for the last-level cache, large enough that Python's share of the time is
small."""

TRANSPOSED_STRIPE_BYTES = 16 << 20
"""The same where the weight lies transposed: each input row gives a short run, and short runs make slow reads."""

WORK = frozenset(("copy", "dequantize", "weight"))
"""Roles of outputs that the engine writes; the others are scales."""

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class Workbench(threading.local):
    """One thread's buffers, grown to the largest stripe and reused."""

    def __init__(self) -> None:
        self._raw = memoryview(bytearray())
        self._codes = np.empty(0, np.uint8)

    def raw(self, size: int) -> memoryview:
        """Room for `size` source bytes."""
        if len(self._raw) < size:
            self._raw = memoryview(np.empty(size, np.uint8).data)
        return self._raw[:size]

    def codes(self, rows: int, columns: int) -> Tensor:
        """Room for codes, float8_e4m3fn [rows, columns]."""
        if self._codes.size < rows * columns:
            self._codes = np.empty(rows * columns, np.uint8)
        flat = torch.from_numpy(self._codes[: rows * columns])
        return flat.view(torch.float8_e4m3fn).view(rows, columns)


@dataclass(slots=True)
class SourceScale:
    """Scales of a source weight that is FP8 already: one, one per row, or one per block."""

    info: TensorInfo
    block: tuple[int, int]
    values: Tensor | None = None
    """float32 [block rows, block columns]; None until first used."""

    def of_rows(self, files: SourceFiles, start: int, end: int, columns: int) -> Tensor:
        """Scales of rows [start, end), broadcastable to [end - start, columns]."""
        if self.values is None:
            raw = memoryview(bytearray(self.info.nbytes))
            files.read_into(self.info.shard, self.info.begin, raw, self.info.name)
            flat = torch.frombuffer(raw, dtype=_DTYPES[self.info.dtype]).float()
            self.values = flat.view(self.info.shape if len(self.info.shape) == 2 else (-1, 1))
        values = self.values
        if values.shape[1] == 1 and columns > self.block[1]:  # one per tensor or row, not a narrow matrix of blocks
            return values if len(values) == 1 else values[start:end]
        rows, width = self.block
        return values[torch.arange(start, end) // rows].repeat_interleave(width, 1)[:, :columns]


@dataclass(frozen=True, slots=True)
class WeightView:
    """A Linear weight [out, in] inside a source tensor: all of it, or some rows of one expert."""

    info: TensorInfo
    slice: Slice | None
    rows: int
    columns: int
    scale: SourceScale | None = None
    left: int = 0
    """First column of the source tensor that the view shows: 0 but for panels."""

    @property
    def row_bytes(self) -> int:
        return self.columns * ITEM_BYTES[self.info.dtype]

    def panels(self, block: tuple[int, int]) -> list[WeightView]:
        """The view cut into columns of whole blocks, so that one band of blocks is not larger than a stripe."""
        rows, width = block
        if self.slice is not None or self.scale is not None or rows * self.row_bytes <= STRIPE_BYTES:
            return [self]
        item = ITEM_BYTES[self.info.dtype]
        width *= max(1, STRIPE_BYTES // (rows * width * item))
        lefts = range(0, self.columns, width)
        return [replace(self, left=left, columns=min(width, self.columns - left)) for left in lefts]

    def stripes(self, multiple: int) -> list[tuple[int, int]]:
        """Row ranges to work on, each but the last a multiple of `multiple` rows."""
        transposed = self.slice is not None and self.slice.transposed
        budget = TRANSPOSED_STRIPE_BYTES if transposed else STRIPE_BYTES
        height = max(1, budget // max(1, self.row_bytes * multiple)) * multiple
        return [(start, min(start + height, self.rows)) for start in range(0, self.rows, height)]

    def read(self, files: SourceFiles, start: int, end: int, bench: Workbench) -> Tensor:
        """Rows [start, end) as [end - start, in] in the source's dtype, float32 where that is FP8. Valid until the
        thread's next read."""
        stripe = self._read(files, start, end, bench)
        if self.scale is None:
            return stripe
        return stripe.float().mul_(self.scale.of_rows(files, start, end, self.columns))

    def _read(self, files: SourceFiles, start: int, end: int, bench: Workbench) -> Tensor:
        dtype = _DTYPES[self.info.dtype]
        if self.slice is None and self.columns < self.info.shape[1]:
            return self._read_panel(files, start, end, bench)
        if self.slice is None:
            raw = bench.raw((end - start) * self.row_bytes)
            files.read_into(self.info.shard, self.info.begin + start * self.row_bytes, raw, self.info.name)
            return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(end - start, self.columns)
        part = self.slice
        first, last = part.start + part.step * start, part.start + part.step * (end - 1) + 1
        if part.transposed:
            block = self._read_columns(files, part, first, last, bench)  # [in, last - first]
            return block[:, :: part.step].T.contiguous()
        raw = bench.raw((last - first) * self.row_bytes)
        all_rows = self.info.shape[1]
        offset = self.info.begin + (part.expert * all_rows + first) * self.row_bytes
        files.read_into(self.info.shard, offset, raw, self.info.name)
        return (
            torch.frombuffer(raw, dtype=torch.uint8)
            .view(dtype)
            .view(last - first, self.columns)[:: part.step]
            .contiguous()
        )

    def _read_panel(self, files: SourceFiles, start: int, end: int, bench: Workbench) -> Tensor:
        item, run = ITEM_BYTES[self.info.dtype], self.row_bytes
        raw = bench.raw((end - start) * run)
        for row in range(start, end):
            offset = self.info.begin + (row * self.info.shape[1] + self.left) * item
            files.read_into(self.info.shard, offset, raw[(row - start) * run : (row - start + 1) * run], self.info.name)
        return torch.frombuffer(raw, dtype=torch.uint8).view(_DTYPES[self.info.dtype]).view(end - start, self.columns)

    def _read_columns(self, files: SourceFiles, part: Slice, first: int, last: int, bench: Workbench) -> Tensor:
        item = ITEM_BYTES[self.info.dtype]
        width, run = self.info.shape[2], (last - first) * item
        raw = bench.raw(self.columns * run)
        base = self.info.begin + part.expert * self.columns * width * item + first * item
        for row in range(self.columns):
            piece = raw[row * run : (row + 1) * run]
            files.read_into(self.info.shard, base + row * width * item, piece, self.info.name)
        return torch.frombuffer(raw, dtype=torch.uint8).view(_DTYPES[self.info.dtype]).view(self.columns, last - first)

    @property
    def shards(self) -> set[str]:
        """Source files that must be there."""
        return {self.info.shard} | ({self.scale.info.shard} if self.scale is not None else set())

    def index_of(self, row: int, column: int) -> tuple[int, ...]:
        """Index in the source tensor of a weight's element."""
        if self.slice is None:
            return row, self.left + column
        place = self.slice.start + self.slice.step * row
        return (self.slice.expert, column, place) if self.slice.transposed else (self.slice.expert, place, column)


@dataclass(slots=True)
class Weight:
    """One weight on its way: where it comes from, where it goes, its scale as far as known."""

    view: WeightView
    output: OutputTensor
    scale_output: OutputTensor
    scale: Tensor
    """float32; [] per tensor, [out, 1] per channel, [blocks, blocks]."""
    zeros: Tensor
    """bool, shape of `scale`: the unit holds nothing but zeros."""
    row_errors: Tensor | None = None
    """float64 [shrinks, out]: squared errors of each row, for the mse observer per tensor."""


@dataclass(slots=True)
class Unit:
    """Weights that share one range, or one weight with ranges of its own."""

    weights: list[Weight]
    amax: float | None = None
    """Per tensor: the range, after the observer."""
    measured: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.weights[0].output.name

    @property
    def shards(self) -> set[str]:
        """Source files that must be there."""
        return set().union(*(weight.view.shards for weight in self.weights))


class Engine:
    """Turns the plan's units and kept tensors into tasks, once their source shards are there."""

    def __init__(
        self,
        plan: Plan,
        files: SourceFiles,
        shards: Mapping[str, OutputShard],
        journal: Journal,
        pool: Pool,
        on_finished: Callable[[OutputTensor], None],
        progress: Progress,
    ) -> None:
        self._scheme = plan.settings.weights
        self._files = files
        self._shards = shards
        self._journal = journal
        self._pool = pool
        self._on_finished = on_finished
        self._bench = Workbench()
        self._meter = _Meter(plan, journal.finished, progress)
        self._waiting: list[tuple[set[str], Task]] = []
        views = _Views(plan)
        for unit in _units(plan, views):
            if not all(weight.output.name in journal.finished for weight in unit.weights):
                self._waiting.append((unit.shards, partial(self._start_unit, unit)))
        for output in plan.outputs:
            if output.name in journal.finished:
                continue
            if output.role == "copy":
                info = views.sources[output.source]
                self._waiting.append(({info.shard}, partial(self._start_copy, info, output)))
            elif output.role == "dequantize":
                view = views.of(output)
                self._waiting.append((view.shards, partial(self._start_dequantize, view, output)))

    def release(self, available: set[str]) -> None:
        """Queue what needs no source shard but `available` ones."""
        ready = [start for needs, start in self._waiting if needs <= available]
        self._waiting = [(needs, start) for needs, start in self._waiting if not needs <= available]
        self._pool.add(ready)

    # ------------------------------------------------------------------------------------------ kept tensors

    def _start_copy(self, info: TensorInfo, output: OutputTensor) -> None:
        spans = [(at, min(at + STRIPE_BYTES, info.nbytes)) for at in range(0, info.nbytes, STRIPE_BYTES)]
        tasks = [partial(self._copy, info, output, begin, end) for begin, end in spans]
        self._pool.add(tasks, then=partial(self._finish_copy, info, output), urgent=True)

    def _copy(self, info: TensorInfo, output: OutputTensor, begin: int, end: int) -> None:
        raw = self._bench.raw(end - begin)
        self._files.read_into(info.shard, info.begin + begin, raw, info.name)
        self._shards[output.shard].write_at(output.begin + begin, raw)
        self._meter.add(end - begin)

    def _finish_copy(self, info: TensorInfo, output: OutputTensor) -> None:
        self._files.check_unchanged(info.shard)
        self._finish(output, [])

    def _start_dequantize(self, view: WeightView, output: OutputTensor) -> None:
        tasks = [partial(self._dequantize, view, output, start, end) for start, end in view.stripes(1)]
        self._pool.add(tasks, then=partial(self._finish_copy, view.info, output), urgent=True)

    def _dequantize(self, view: WeightView, output: OutputTensor, start: int, end: int) -> None:
        stripe = view.read(self._files, start, end, self._bench).to(_DTYPES[output.dtype])
        raw = stripe.view(torch.uint8).numpy().reshape(-1).data
        self._shards[output.shard].write_at(output.begin + start * view.columns * ITEM_BYTES[output.dtype], raw)
        self._meter.add((end - start) * view.row_bytes)

    # ------------------------------------------------------------------------------------------ weights

    def _start_unit(self, unit: Unit) -> None:
        if self._scheme.strategy != "tensor":
            self._encode_unit(unit)
            return
        unit.amax = self._journal.amax.get(unit.name)
        if unit.amax is not None:
            self._encode_unit(unit)
            return
        tasks = [partial(self._measure, unit, weight, *rows) for weight, rows in _stripes(unit, 1)]
        self._pool.add(tasks, then=partial(self._after_measure, unit), urgent=True)

    def _measure(self, unit: Unit, weight: Weight, start: int, end: int) -> None:
        stripe = weight.view.read(self._files, start, end, self._bench)
        amax = numerics.tensor_amax(stripe)
        self._refuse_nonfinite(weight.view, stripe, start, amax)
        unit.measured.append(float(amax))

    def _after_measure(self, unit: Unit) -> None:
        unit.amax = max(unit.measured, default=0.0)
        if self._scheme.observer == "minmax":
            self._settle(unit)
            return
        for weight in unit.weights:
            weight.row_errors = torch.empty(len(numerics.SHRINKS), weight.view.rows, dtype=torch.float64)
        tasks = [partial(self._measure_errors, unit, weight, *rows) for weight, rows in _stripes(unit, 1)]
        self._pool.add(tasks, then=partial(self._after_errors, unit), urgent=True)

    def _measure_errors(self, unit: Unit, weight: Weight, start: int, end: int) -> None:
        assert unit.amax is not None and weight.row_errors is not None
        stripe = weight.view.read(self._files, start, end, self._bench)
        weight.row_errors[:, start:end] = numerics.shrink_errors(stripe, torch.tensor(unit.amax))[:, :, 0]

    def _after_errors(self, unit: Unit) -> None:
        assert unit.amax is not None
        errors = torch.stack(
            [weight.row_errors.sum(1) for weight in unit.weights if weight.row_errors is not None]
        ).sum(0)
        unit.amax = float(numerics.best_amax(torch.tensor(unit.amax), errors))
        self._settle(unit)

    def _settle(self, unit: Unit) -> None:
        assert unit.amax is not None
        self._journal.add_amax(unit.name, unit.amax)
        self._encode_unit(unit)

    def _encode_unit(self, unit: Unit) -> None:
        for weight in unit.weights:
            if weight.output.name in self._journal.finished:
                continue
            if unit.amax is not None:
                weight.scale.copy_(numerics.weight_scale(torch.tensor(unit.amax)))
                weight.zeros.fill_(unit.amax == 0)
            block = self._scheme.block_shape if self._scheme.strategy == "block" else None
            panels = weight.view.panels(block) if block else [weight.view]
            multiple = block[0] if block else 1
            tasks = [partial(self._encode, weight, view, *rows) for view in panels for rows in view.stripes(multiple)]
            self._pool.add(tasks, then=partial(self._finish_weight, weight), urgent=True)

    def _encode(self, weight: Weight, view: WeightView, start: int, end: int) -> None:
        stripe = view.read(self._files, start, end, self._bench)
        codes = self._bench.codes(end - start, view.columns)
        block = self._scheme.block_shape if self._scheme.strategy == "block" else None
        numerics.encode(stripe, self._stripe_scale(weight, view, stripe, start), codes, block=block)
        self._write(weight, view, codes, start)
        self._meter.add((end - start) * view.row_bytes)

    def _write(self, weight: Weight, view: WeightView, codes: Tensor, start: int) -> None:
        raw = codes.view(torch.uint8).numpy().reshape(-1).data
        shard, width = self._shards[weight.output.shard], weight.view.columns
        place = weight.output.begin + start * width + view.left
        if view.columns == width:
            shard.write_at(place, raw)
            return
        for row in range(len(codes)):
            shard.write_at(place + row * width, raw[row * view.columns : (row + 1) * view.columns])

    def _stripe_scale(self, weight: Weight, view: WeightView, stripe: Tensor, start: int) -> Tensor:
        """The scales of the stripe, measured now unless one scale serves the whole tensor."""
        if self._scheme.strategy == "tensor":
            return weight.scale
        if self._scheme.strategy == "channel":
            amax = numerics.channel_amax(stripe)
            top, left = start, 0
        else:
            amax = numerics.block_amax(stripe, self._scheme.block_shape)
            top, left = start // self._scheme.block_shape[0], view.left // self._scheme.block_shape[1]
        self._refuse_nonfinite(view, stripe, start, amax)
        place = slice(top, top + amax.shape[0]), slice(left, left + amax.shape[1])
        weight.zeros[place] = amax == 0
        if self._scheme.observer == "mse":
            amax = self._shrunk(stripe, amax)
        weight.scale[place] = numerics.weight_scale(amax)
        return weight.scale[place]

    def _shrunk(self, stripe: Tensor, amax: Tensor) -> Tensor:
        if self._scheme.strategy == "channel":
            return numerics.best_amax(amax, numerics.shrink_errors(stripe, amax))
        rows, columns = self._scheme.block_shape
        per_row = amax.repeat_interleave(rows, 0)[: len(stripe)]
        errors = numerics.shrink_errors(stripe, per_row, columns=columns)  # [shrinks, rows, runs]
        return numerics.best_amax(amax, torch.stack([band.sum(1) for band in errors.split(rows, dim=1)], dim=1))

    def _refuse_nonfinite(self, view: WeightView, stripe: Tensor, start: int, amax: Tensor) -> None:
        if bool(torch.isfinite(amax).all()):
            return
        found = numerics.first_nonfinite(stripe)
        assert found is not None
        value = float(stripe[found])
        index = list(view.index_of(start + found[0], found[1]))
        info = view.info
        raise NonFiniteWeight(
            f"{info.shard}: {info.name}{index} is {value}; the source is broken, nothing can be made of it"
        )

    def _finish_weight(self, weight: Weight) -> None:
        self._files.check_unchanged(weight.view.info.shard)
        shard = self._shards[weight.output.shard]
        shard.write_at(weight.scale_output.begin, memoryview(weight.scale.numpy().tobytes()))
        self._finish(weight.output, _zero_units(weight))

    def _finish(self, output: OutputTensor, zeros: list[str]) -> None:
        self._shards[output.shard].start_flush(output.begin, output.end)
        self._journal.add_finished(output.name, zeros)
        self._meter.finish_tensor()
        self._on_finished(output)


def _stripes(unit: Unit, multiple: int) -> Iterable[tuple[Weight, tuple[int, int]]]:
    return [(weight, rows) for weight in unit.weights for rows in weight.view.stripes(multiple)]


class _Views:
    """How outputs look into the source."""

    def __init__(self, plan: Plan) -> None:
        self.sources = {tensor.name: tensor.info for tensor in plan.tensors}
        block = plan.source_block or (1, 1)
        self._scales = {
            tensor.name: SourceScale(self.sources[tensor.scale], block) for tensor in plan.tensors if tensor.scale
        }

    def of(self, output: OutputTensor) -> WeightView:
        """The Linear weight behind a `weight` or `dequantize` output."""
        rows, columns = output.shape
        scale = self._scales.get(output.source)
        return WeightView(self.sources[output.source], output.slice, rows, columns, scale)


def _units(plan: Plan, views: _Views) -> list[Unit]:
    """Units in the order of the source's bytes."""
    scheme = plan.settings.weights
    scales = {output.module: output for output in plan.outputs if output.role == "weight_scale"}
    units: dict[str, Unit] = {}
    for output in plan.outputs:
        if output.role != "weight":
            continue
        shape = _scale_shape(scales[output.module].shape, scheme.strategy)
        zeros = torch.zeros(shape, dtype=torch.bool)
        weight = Weight(views.of(output), output, scales[output.module], torch.empty(shape), zeros)
        together = scheme.strategy == "tensor" and scheme.share_scales and output.group
        units.setdefault(output.group if together else output.name, Unit([])).weights.append(weight)
    return list(units.values())


def _scale_shape(on_disk: tuple[int, ...], strategy: str) -> tuple[int, ...]:
    return () if strategy == "tensor" else on_disk


def _zero_units(weight: Weight) -> list[str]:
    """Names of the weight's all-zero scale units: the tensor itself, or `tensor[row]`, `tensor[row, column]` of
    scales."""
    if not bool(weight.zeros.any()):
        return []
    if bool(weight.zeros.all()):
        return [weight.output.name]
    places = weight.zeros.nonzero().tolist()
    keep = 1 if weight.zeros.shape[-1] == 1 else 2
    return [f"{weight.output.name}[{', '.join(map(str, place[:keep]))}]" for place in places]


class _Meter:
    """Progress in source bytes, told about every 32 MB and at the end of each tensor's last one."""

    def __init__(self, plan: Plan, finished: set[str], progress: Progress) -> None:
        work = [output for output in plan.outputs if output.role in WORK]
        sources = {tensor.name: tensor.info for tensor in plan.tensors}
        share = {output.name: _source_share(output, sources[output.source]) for output in work}
        self._total = sum(share.values())
        self._done = sum(share[name] for name in finished if name in share)
        self._tensors, self._all_tensors = len(finished & set(share)), len(work)
        self._told = self._done
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._done - self._told >= 32 << 20:
                self._tell()

    def finish_tensor(self) -> None:
        with self._lock:
            self._tensors += 1
            if self._tensors == self._all_tensors:
                self._tell()

    def _tell(self) -> None:
        self._told = self._done
        note = f"{self._tensors}/{self._all_tensors} tensors"
        self._progress(ProgressEvent("quantize", self._done, self._total, "B", note))


def _source_share(output: OutputTensor, info: TensorInfo) -> int:
    """Source bytes behind an output: all for a copy or a whole weight, its part of a tensor of experts."""
    return info.nbytes if output.slice is None else math.prod(output.shape) * ITEM_BYTES[info.dtype]
