"""Weights through numerics into their planned bytes, stripe by stripe.

A stripe is read by position, measured, encoded, written by position. Scales per row or block need only their stripe,
so its bytes are read once; a scale per tensor needs all stripes of its unit measured before the first is encoded, so
they are read twice. Memory is one stripe and its codes per thread, whatever the size of tensors and models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fp8pipe.errors import NonFiniteWeight
from fp8pipe.model.dtypes import DTYPES
from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.model.shards import OutputShard, SourceFiles
from fp8pipe.progress import Progress
from fp8pipe.quantize import numerics
from fp8pipe.quantize.engine.journal import Journal
from fp8pipe.quantize.engine.meter import Meter
from fp8pipe.quantize.engine.pool import Pool, Task
from fp8pipe.quantize.engine.units import Unit, Weight, units_of, zero_units
from fp8pipe.quantize.engine.views import STRIPE_BYTES, Views, WeightView, Workbench
from fp8pipe.quantize.plan import OutputTensor, Plan
from fp8pipe.quantize.plan.choose import FLOATS

_EXPERTS = ("_proj", "_proj_bias")
"""How the names of weights end that hold all experts in one tensor: `experts.gate_up_proj`."""


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
        device: str = "cpu",
    ) -> None:
        self._scheme = plan.settings.weights
        self._files = files
        self._shards = shards
        self._journal = journal
        self._pool = pool
        self._on_finished = on_finished
        self._bench = Workbench(device)
        self._meter = Meter(plan, journal.finished, progress)
        self._waiting: list[tuple[set[str], Task]] = []
        views = Views(plan)
        for unit in units_of(plan, views):
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
        item = ITEM_BYTES[info.dtype]
        step = max(1, STRIPE_BYTES // item) * item  # whole elements
        spans = [(at, min(at + step, info.nbytes)) for at in range(0, info.nbytes, step)]
        tasks = [partial(self._copy, info, output, begin, end) for begin, end in spans]
        self._pool.add(tasks, then=partial(self._finish_copy, info, output), urgent=True)

    def _copy(self, info: TensorInfo, output: OutputTensor, begin: int, end: int) -> None:
        raw = self._bench.raw(end - begin)
        self._files.read_into(info.shard, info.begin + begin, raw, info.name)
        if _must_be_finite(info):
            self._refuse_nonfinite_copy(info, raw, begin)
        self._shards[output.shard].write_at(output.begin + begin, raw, output.name)
        self._meter.add(end - begin)

    def _refuse_nonfinite_copy(self, info: TensorInfo, raw: memoryview, begin: int) -> None:
        values = torch.frombuffer(raw, dtype=torch.uint8).view(DTYPES[info.dtype])
        if bool(torch.isfinite(numerics.tensor_amax(values.view(1, -1)))):
            return
        found = numerics.first_nonfinite(values)
        assert found is not None
        index = np.unravel_index(begin // ITEM_BYTES[info.dtype] + found[0], info.shape)
        raise _nonfinite(info, map(int, index), float(values[found]))

    def _finish_copy(self, info: TensorInfo, output: OutputTensor) -> None:
        self._files.check_unchanged(info.shard)
        self._finish(output, [])

    def _start_dequantize(self, view: WeightView, output: OutputTensor) -> None:
        tasks = [partial(self._dequantize, view, output, start, end) for start, end in view.stripes(1)]
        self._pool.add(tasks, then=partial(self._finish_copy, view.info, output), urgent=True)

    def _dequantize(self, view: WeightView, output: OutputTensor, start: int, end: int) -> None:
        stripe = view.read(self._files, start, end, self._bench).to(DTYPES[output.dtype])
        self._refuse_nonfinite(view, stripe, start, numerics.tensor_amax(stripe))
        raw = stripe.view(torch.uint8).numpy().reshape(-1).data
        place = output.begin + start * view.columns * ITEM_BYTES[output.dtype]
        self._shards[output.shard].write_at(place, raw, output.name)
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
        tasks = [partial(self._measure, unit, *part) for part in unit.stripes()]
        self._pool.add(tasks, then=partial(self._after_measure, unit), urgent=True)

    def _measure(self, unit: Unit, weight: Weight, start: int, end: int) -> None:
        stripe = weight.view.read(self._files, start, end, self._bench)
        with self._bench.stream():
            amax = numerics.tensor_amax(self._bench.to_device(stripe)).cpu()
        self._refuse_nonfinite(weight.view, stripe, start, amax)
        unit.measured.append(float(amax))

    def _after_measure(self, unit: Unit) -> None:
        unit.amax = max(unit.measured, default=0.0)
        if self._scheme.observer == "minmax":
            self._settle(unit)
            return
        tasks = [partial(self._measure_errors, unit, *part) for part in unit.stripes()]
        self._pool.add(tasks, then=partial(self._after_errors, unit), urgent=True)

    def _measure_errors(self, unit: Unit, weight: Weight, start: int, end: int) -> None:
        assert unit.amax is not None
        stripe = weight.view.read(self._files, start, end, self._bench)
        errors = numerics.shrink_errors(stripe, torch.tensor(unit.amax))  # [shrinks, rows, 1]
        unit.errors[weight.output.name, start] = errors.sum((1, 2))

    def _after_errors(self, unit: Unit) -> None:
        assert unit.amax is not None
        in_order = [unit.errors[weight.output.name, start] for weight, start, _ in unit.stripes()]
        unit.amax = float(numerics.best_amax(torch.tensor(unit.amax), torch.stack(in_order).sum(0)))
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
        bench = self._bench
        stripe = view.read(self._files, start, end, bench)
        block = self._scheme.block_shape if self._scheme.strategy == "block" else None
        with bench.stream():
            on_device, codes = bench.to_device(stripe), bench.codes(end - start, view.columns)
            scale = self._stripe_scale(weight, view, stripe, on_device, start)
            numerics.encode(on_device, bench.to_device(scale), codes, block=block)
            codes = bench.to_host(codes)
        self._write(weight, view, codes, start)
        self._meter.add((end - start) * view.row_bytes)

    def _write(self, weight: Weight, view: WeightView, codes: Tensor, start: int) -> None:
        raw = codes.view(torch.uint8).numpy().reshape(-1).data
        shard, width = self._shards[weight.output.shard], weight.view.columns
        place = weight.output.begin + start * width + view.left
        if view.columns == width:
            shard.write_at(place, raw, weight.output.name)
            return
        for row in range(len(codes)):
            piece = raw[row * view.columns : (row + 1) * view.columns]
            shard.write_at(place + row * width, piece, weight.output.name)

    def _stripe_scale(self, weight: Weight, view: WeightView, stripe: Tensor, on_device: Tensor, start: int) -> Tensor:
        """The scales of the stripe, measured now unless one scale serves the whole tensor. On the CPU, where only the
        amax comes from the device: divisions and sums there might round otherwise."""
        if self._scheme.strategy == "tensor":
            return weight.scale
        if self._scheme.strategy == "channel":
            amax = numerics.channel_amax(on_device).cpu()
            top, left = start, 0
        else:
            amax = numerics.block_amax(on_device, self._scheme.block_shape).cpu()
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
        raise _nonfinite(view.info, view.index_of(start + found[0], found[1]), float(stripe[found]))

    def _finish_weight(self, weight: Weight) -> None:
        self._files.check_unchanged(weight.view.info.shard)
        shard = self._shards[weight.output.shard]
        scale = weight.scale.reshape(-1).view(torch.uint8).numpy().data
        shard.write_at(weight.scale_output.begin, scale, weight.scale_output.name)
        self._finish(weight.output, zero_units(weight))

    def _finish(self, output: OutputTensor, zeros: list[str]) -> None:
        self._shards[output.shard].start_flush(output.begin, output.end)
        self._journal.add_finished(output.name, zeros)
        self._meter.finish_tensor()
        self._on_finished(output)


def _must_be_finite(info: TensorInfo) -> bool:
    """Whether a kept tensor is a weight or bias. Buffers, such as masks, may hold what they like: -inf, mostly."""
    leaf = info.name.rpartition(".")[2]
    return info.dtype in FLOATS and (leaf in {"weight", "bias"} or leaf.endswith(_EXPERTS))


def _nonfinite(info: TensorInfo, index: Iterable[int], value: float) -> NonFiniteWeight:
    place = f"{info.shard}: {info.name}{list(index)}"
    return NonFiniteWeight(f"{place} is {value}; the source is broken, nothing can be made of it")
