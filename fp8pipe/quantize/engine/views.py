"""How a Linear weight is stored in the source, and how a stripe of it is read into a thread's buffer.

A weight [out, in] may be a whole tensor, some rows of one expert inside a tensor of experts, transposed or not, or FP8
codes with their scales. A *stripe* is a run of its rows, about 4 MB; a *panel* is a run of its columns, used for blocks
of very wide weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fp8pipe.model import fp8_source
from fp8pipe.model.fp8_source import ScaleGrid
from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.model.names import FP8
from fp8pipe.model.shards import SourceFiles
from fp8pipe.quantize.engine.workbench import Workbench
from fp8pipe.quantize.kernels import ARRAYS, Array
from fp8pipe.quantize.plan import OutputTensor, Plan, PlannedTensor, Slice

if TYPE_CHECKING:
    from torch import Tensor

STRIPE_BYTES = 4 << 20
"""Source bytes of a stripe: small enough for the last-level cache, large enough that Python's overhead does not
matter."""

TRANSPOSED_STRIPE_BYTES = 16 << 20
"""The same for a transposed weight: a row on disk holds only a short run of its stripe, and short reads are slow."""


@dataclass(slots=True)
class SourceScales:
    """The scales of a source weight that is FP8 already, read when they are first needed."""

    info: TensorInfo
    grid: ScaleGrid
    values: Tensor | None = None
    """float32, shape of the grid; None until they are read."""

    def read(self, files: SourceFiles) -> Tensor:
        """All of them, float32 in the shape of the grid."""
        if self.values is None:
            raw = memoryview(bytearray(self.info.nbytes))
            files.read_into(self.info.shard, self.info.begin, raw, self.info.name)
            self.values = fp8_source.scale_values(raw, self.info.dtype, self.grid)
        return self.values


@dataclass(frozen=True, slots=True)
class WeightView:
    """A Linear weight [out, in] in the source: a whole tensor, some rows of one expert, or a panel of either."""

    info: TensorInfo
    slice: Slice | None
    rows: int
    columns: int
    scales: SourceScales | None = None
    left: int = 0
    """First column of the source tensor in the view; 0 except for panels."""

    @property
    def row_bytes(self) -> int:
        return self.columns * ITEM_BYTES[self.info.dtype]

    def panels(self, block: tuple[int, int]) -> list[WeightView]:
        """The view cut into columns of whole blocks, so that a row of blocks is no larger than a stripe."""
        rows, width = block
        if self.slice is not None or self.scales is not None or rows * self.row_bytes <= STRIPE_BYTES:
            return [self]
        item = ITEM_BYTES[self.info.dtype]
        width *= max(1, STRIPE_BYTES // (rows * width * item))
        lefts = range(0, self.columns, width)
        return [replace(self, left=left, columns=min(width, self.columns - left)) for left in lefts]

    def stripes(self, multiple: int) -> list[tuple[int, int]]:
        """Row ranges (start, end) to work on; all but the last are a multiple of `multiple` rows high."""
        transposed = self.slice is not None and self.slice.transposed
        budget = TRANSPOSED_STRIPE_BYTES if transposed else STRIPE_BYTES
        height = max(1, budget // max(1, self.row_bytes * multiple)) * multiple
        return [(start, min(start + height, self.rows)) for start in range(0, self.rows, height)]

    def read(self, files: SourceFiles, start: int, end: int, bench: Workbench) -> Array:
        """Rows [start, end) as [end - start, in], an array of ../kernels.py; float32 where the source is FP8.

        Valid until the thread's next read."""
        stripe = self._read(files, start, end, bench)
        if self.scales is None:
            return stripe
        import torch

        codes = torch.from_numpy(stripe).view(torch.float8_e4m3fn)
        scales = self.scales.read(files)
        return fp8_source.dequantize(codes, scales, self.scales.grid.unit, first_row=start).numpy()

    def _read(self, files: SourceFiles, start: int, end: int, bench: Workbench) -> Array:
        if self.slice is None and self.columns < self.info.shape[1]:
            return self._read_panel(files, start, end, bench)
        if self.slice is None:
            raw = bench.raw((end - start) * self.row_bytes)
            files.read_into(self.info.shard, self.info.begin + start * self.row_bytes, raw, self.info.name)
            return self._array(raw, end - start, self.columns)
        part = self.slice
        first, last = part.start + part.step * start, part.start + part.step * (end - 1) + 1
        if part.transposed:
            block = self._read_columns(files, part, first, last, bench)  # [in, last - first]
            return np.ascontiguousarray(block[:, :: part.step].T)
        raw = bench.raw((last - first) * self.row_bytes)
        all_rows = self.info.shape[1]
        offset = self.info.begin + (part.expert * all_rows + first) * self.row_bytes
        files.read_into(self.info.shard, offset, raw, self.info.name)
        return np.ascontiguousarray(self._array(raw, last - first, self.columns)[:: part.step])

    def _array(self, raw: memoryview, rows: int, columns: int) -> Array:
        return np.frombuffer(raw, np.uint8 if self.info.dtype == FP8 else ARRAYS[self.info.dtype]).reshape(
            rows, columns
        )

    def _read_panel(self, files: SourceFiles, start: int, end: int, bench: Workbench) -> Array:
        item, run = ITEM_BYTES[self.info.dtype], self.row_bytes
        raw = bench.raw((end - start) * run)
        for row in range(start, end):
            offset = self.info.begin + (row * self.info.shape[1] + self.left) * item
            files.read_into(self.info.shard, offset, raw[(row - start) * run : (row - start + 1) * run], self.info.name)
        return self._array(raw, end - start, self.columns)

    def _read_columns(self, files: SourceFiles, part: Slice, first: int, last: int, bench: Workbench) -> Array:
        item = ITEM_BYTES[self.info.dtype]
        width, run = self.info.shape[2], (last - first) * item
        raw = bench.raw(self.columns * run)
        base = self.info.begin + part.expert * self.columns * width * item + first * item
        for row in range(self.columns):
            piece = raw[row * run : (row + 1) * run]
            files.read_into(self.info.shard, base + row * width * item, piece, self.info.name)
        return self._array(raw, self.columns, last - first)

    @property
    def shards(self) -> set[str]:
        """Source files that it is read from."""
        return {self.info.shard} | ({self.scales.info.shard} if self.scales is not None else set())

    def index_of(self, row: int, column: int) -> tuple[int, ...]:
        """Index in the source tensor of the weight's element [row, column]."""
        if self.slice is None:
            return row, self.left + column
        place = self.slice.start + self.slice.step * row
        return (self.slice.expert, column, place) if self.slice.transposed else (self.slice.expert, place, column)


class Views:
    """Finds the source weight behind an output."""

    def __init__(self, plan: Plan) -> None:
        self.sources = {tensor.name: tensor.info for tensor in plan.tensors}
        self._scales = {
            tensor.name: _scales_of(tensor, self.sources[tensor.scale], plan) for tensor in plan.tensors if tensor.scale
        }

    def of(self, output: OutputTensor) -> WeightView:
        """The Linear weight behind a `weight` or `dequantize` output."""
        rows, columns = output.shape
        scales = self._scales.get(output.source)
        return WeightView(self.sources[output.source], output.slice, rows, columns, scales)


def _scales_of(weight: PlannedTensor, info: TensorInfo, plan: Plan) -> SourceScales:
    grid = fp8_source.grid_of(weight.shape, info.shape, plan.source_block)
    assert grid is not None, "the plan has checked the shapes"
    return SourceScales(info, grid)
