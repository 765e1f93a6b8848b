"""Reads weights and scales by rows: those of the checkpoint, and the source's in whatever form it has them."""

from __future__ import annotations

from contextlib import ExitStack
from threading import Lock

import numpy as np
import torch

from fp8pipe.model.fp8_source import ScaleGrid, dequantize
from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.model.shards import SourceFiles
from fp8pipe.validate.meaning.formats import Spec
from fp8pipe.validate.meaning.layout import Piece
from fp8pipe.validate.measured import Array
from fp8pipe.validate.measuring.units import scale_values, unit_rows
from fp8pipe.validate.reading.checkpoint import CheckpointFiles

PANEL_BYTES = 1 << 24
"""Source bytes read at a time where an expert's matrix is transposed: short runs make slow reads."""


class TensorBytes:
    """Bytes of the tensors of one folder."""

    def __init__(self, files: CheckpointFiles, stack: ExitStack) -> None:
        assert files.place.root is not None, "values are read from a folder"
        self.count = 0
        """Bytes read so far."""
        self._files = SourceFiles(files.place.root, stack)
        self._counting = Lock()
        for name in files.shards():
            self._files.open(name)

    def read(self, entry: TensorInfo, offset: int, size: int) -> Array:
        """`size` bytes of a tensor from `offset` on."""
        buffer = np.empty(size, np.uint8)
        self._files.read_into(entry.shard, entry.begin + offset, buffer.data, entry.name)
        with self._counting:
            self.count += size
        return buffer


class Scales:
    """Multipliers of one weight of the checkpoint, by rows of the unit grid; those of groups are read as needed."""

    def __init__(
        self, tensors: TensorBytes, entry: TensorInfo, spec: Spec, grid: tuple[int, ...], global_scale: float
    ) -> None:
        self._tensors, self._entry, self._spec, self._grid, self._global = tensors, entry, spec, grid, global_scale
        self._all: torch.Tensor | None = None
        if spec.strategy != "group":
            self._all = scale_values(tensors.read(entry, 0, entry.nbytes), entry.dtype).reshape(grid)

    @property
    def can_divide(self) -> bool:
        """Whether all are finite and above zero; those of groups are judged as they are read."""
        found = self._all
        return found is None or bool(found.numel() and torch.isfinite(found).all() and (found > 0).all())

    def equal(self, values: torch.Tensor) -> bool:
        """Whether these are the multipliers, in any shape; never of groups."""
        return self._all is not None and torch.equal(self._all.reshape(-1), values.reshape(-1))

    def rows(self, row: int, rows: int) -> torch.Tensor:
        """float32 multipliers of the units of these rows of the weight; groups that cannot divide are NaN."""
        if self._all is not None:
            return self._all[unit_rows(self._spec, row, rows)]
        width = self._grid[1]
        values = scale_values(self._tensors.read(self._entry, row * width, rows * width), self._entry.dtype)
        values = values.reshape(rows, width)
        values = torch.where((values > 0) & torch.isfinite(values), values, torch.nan)
        return values / self._global if self._spec.global_divides else values * self._global


class PlainWeight:
    """A weight [out, in] of an unquantized source: a tensor of its own, or a part of one with all experts."""

    def __init__(self, tensors: TensorBytes, info: TensorInfo, piece: Piece | None) -> None:
        self.dtype = info.dtype
        self._tensors, self._info, self._piece = tensors, info, piece
        self._item = ITEM_BYTES[info.dtype]
        self._panel: tuple[int, Array] | None = None

    def rows(self, row: int, rows: int) -> Array:
        """Bytes of these rows, flat."""
        piece = self._piece
        if piece is None:
            run = self._info.shape[1] * self._item
            return self._tensors.read(self._info, row * run, rows * run)
        first = piece.start + piece.step * row
        if piece.transposed:
            return self._columns(piece, first, first + piece.step * (rows - 1) + 1)
        run = piece.columns * self._item
        height = self._info.shape[1]
        begin = (piece.expert * height + first) * run
        data = self._tensors.read(self._info, begin, (piece.step * (rows - 1) + 1) * run)
        return data if piece.step == 1 else np.ascontiguousarray(data.reshape(-1, run)[:: piece.step]).reshape(-1)

    def _columns(self, piece: Piece, first: int, last: int) -> Array:
        """Columns first, first + step, ... last of a matrix [in, out], as rows."""
        if self._panel is None or not self._panel[0] <= first < last <= self._panel[0] + self._panel[1].shape[1]:
            self._panel = (first, self._read_panel(piece, first, last))
        left, panel = self._panel
        part = panel[:, first - left : last - left : piece.step]  # [in, rows, bytes of an item]
        return np.ascontiguousarray(part.transpose(1, 0, 2)).reshape(-1)

    def _read_panel(self, piece: Piece, first: int, last: int) -> Array:
        width = self._info.shape[2]
        last = min(width, max(last, first + PANEL_BYTES // (piece.columns * self._item)))
        base = piece.expert * piece.columns * width
        runs = [
            self._tensors.read(self._info, (base + row * width + first) * self._item, (last - first) * self._item)
            for row in range(piece.columns)
        ]
        return np.stack(runs).reshape(piece.columns, last - first, self._item)


class Fp8Weight:
    """A weight [out, in] of a source that is FP8 itself: codes times scales, in float32."""

    dtype = "F32"

    def __init__(self, tensors: TensorBytes, info: TensorInfo, scale: TensorInfo, grid: ScaleGrid) -> None:
        self._tensors, self._info, self._unit = tensors, info, grid.unit
        self.scales = scale_values(tensors.read(scale, 0, scale.nbytes), scale.dtype).reshape(grid.shape)

    def codes(self, row: int, rows: int) -> Array:
        """Bytes of these rows as they are stored, flat."""
        width = self._info.shape[1]
        return self._tensors.read(self._info, row * width, rows * width)

    def rows(self, row: int, rows: int) -> Array:
        """Bytes of the float32 values of these rows, flat."""
        return self._values(row, rows).view(torch.uint8).reshape(-1).numpy()

    def cast(self, dtype: torch.dtype, offset: int, size: int) -> Array:
        """Bytes from `offset` on of the whole weight in another dtype, in which it may be kept unquantized."""
        run = self._info.shape[1] * dtype.itemsize
        first, last = offset // run, -(-(offset + size) // run)
        whole = self._values(first, last - first).to(dtype).view(torch.uint8).reshape(-1).numpy()
        return whole[offset - first * run :][:size]

    def _values(self, row: int, rows: int) -> torch.Tensor:
        width = self._info.shape[1]
        codes = torch.from_numpy(self.codes(row, rows)).view(torch.float8_e4m3fn).view(rows, width)
        return dequantize(codes, self.scales, self._unit, first_row=row)
