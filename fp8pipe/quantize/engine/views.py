"""Linear weights as they lie in the source: read by position, stripe by stripe, into one thread's buffers.

A weight [out, in] may be a whole tensor, some rows of one expert inside a tensor of experts, transposed or not, or FP8
codes with their scales. A *stripe* is a run of its rows, about 4 MB; a *panel* some of its columns, for blocks of very
wide weights."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp8pipe.model.dtypes import DTYPES
from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.model.shards import SourceFiles
from fp8pipe.quantize.plan import OutputTensor, Plan, Slice

STRIPE_BYTES = 4 << 20
"""Source bytes of a stripe. Small enough for the last-level cache, large enough that Python's share of the time is
small."""

TRANSPOSED_STRIPE_BYTES = 16 << 20
"""The same where the weight lies transposed: each input row gives a short run, and short runs make slow reads."""


class Workbench(threading.local):
    """One thread's buffers, grown to the largest stripe and reused.

    With a GPU they are pinned, and the thread has a stream of its own: while its stripe travels and is encoded, other
    threads read and write theirs. The bytes are those of the CPU."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._on_gpu else None
        self._raw = self._codes = self._room(0)

    def _room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu)

    def raw(self, size: int) -> memoryview:
        """Room for `size` source bytes."""
        if len(self._raw) < size:
            self._raw = self._room(size)
        return self._raw.numpy().data[:size]

    def stream(self) -> AbstractContextManager[object]:
        """While this lasts, what is sent to the GPU goes through this thread's stream."""
        return torch.cuda.stream(self._stream) if self._on_gpu else nullcontext()

    def to_device(self, tensor: Tensor) -> Tensor:
        """`tensor` where the arithmetic is done. A scalar goes there too: CUDA would multiply by its reciprocal."""
        return tensor.to(self._device, non_blocking=True)

    def codes(self, rows: int, columns: int) -> Tensor:
        """Room for codes on the device, float8_e4m3fn [rows, columns]."""
        if self._on_gpu:
            return torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=self._device)
        return self._host_codes(rows, columns)

    def to_host(self, codes: Tensor) -> Tensor:
        """The codes in this thread's own buffer, once the stream has made them."""
        if self._stream is None:
            return codes
        host = self._host_codes(*codes.shape)
        host.copy_(codes, non_blocking=True)
        self._stream.synchronize()
        return host

    def _host_codes(self, rows: int, columns: int) -> Tensor:
        if len(self._codes) < rows * columns:
            self._codes = self._room(rows * columns)
        return self._codes[: rows * columns].view(torch.float8_e4m3fn).view(rows, columns)


@dataclass(slots=True)
class SourceScale:
    """Scales of a source weight that is FP8 already: one, one per row, or one per block."""

    info: TensorInfo
    block: tuple[int, int] | None
    """Rows and columns that one scale serves; None: one scale for all, or one per row."""
    values: Tensor | None = None
    """float32 [block rows, block columns], [rows, 1] or [1, 1], as the plan has checked; None until first used."""

    def of_rows(self, files: SourceFiles, start: int, end: int, columns: int) -> Tensor:
        """Scales of rows [start, end), broadcastable to [end - start, columns]."""
        if self.values is None:
            raw = memoryview(bytearray(self.info.nbytes))
            files.read_into(self.info.shard, self.info.begin, raw, self.info.name)
            flat = torch.frombuffer(raw, dtype=DTYPES[self.info.dtype]).float()
            self.values = flat.view(self.info.shape if len(self.info.shape) == 2 else (-1, 1))
        values = self.values
        if self.block is None:
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
        dtype = DTYPES[self.info.dtype]
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
        return torch.frombuffer(raw, dtype=torch.uint8).view(DTYPES[self.info.dtype]).view(end - start, self.columns)

    def _read_columns(self, files: SourceFiles, part: Slice, first: int, last: int, bench: Workbench) -> Tensor:
        item = ITEM_BYTES[self.info.dtype]
        width, run = self.info.shape[2], (last - first) * item
        raw = bench.raw(self.columns * run)
        base = self.info.begin + part.expert * self.columns * width * item + first * item
        for row in range(self.columns):
            piece = raw[row * run : (row + 1) * run]
            files.read_into(self.info.shard, base + row * width * item, piece, self.info.name)
        return torch.frombuffer(raw, dtype=torch.uint8).view(DTYPES[self.info.dtype]).view(self.columns, last - first)

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


class Views:
    """How outputs look into the source."""

    def __init__(self, plan: Plan) -> None:
        self.sources = {tensor.name: tensor.info for tensor in plan.tensors}
        self._scales = {
            tensor.name: SourceScale(self.sources[tensor.scale], plan.source_block)
            for tensor in plan.tensors
            if tensor.scale
        }

    def of(self, output: OutputTensor) -> WeightView:
        """The Linear weight behind a `weight` or `dequantize` output."""
        rows, columns = output.shape
        scale = self._scales.get(output.source)
        return WeightView(self.sources[output.source], output.slice, rows, columns, scale)
