"""Refuses weights that are not finite, naming the tensor and the index of the first bad element."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fp8pipe.errors import NonFiniteWeight
from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.model.names import FLOATS
from fp8pipe.quantize import kernels
from fp8pipe.quantize.engine.views import WeightView
from fp8pipe.quantize.kernels import Array

_EXPERTS = ("_proj", "_proj_bias")
"""Endings of tensors that hold all experts: `experts.gate_up_proj`."""


def refuse_nonfinite(view: WeightView, stripe: Array, start: int, amax: Array) -> None:
    """Raise NonFiniteWeight if `amax` of `stripe`, which begins at row `start` of the view, is not finite."""
    if np.isfinite(amax).all():
        return
    row, column, value = _first_nonfinite(stripe)
    raise _nonfinite(view.info, view.index_of(start + row, column), value)


def refuse_nonfinite_bytes(info: TensorInfo, raw: memoryview, begin: int) -> None:
    """The same for bytes of a tensor from byte `begin` on, if it is a tensor that must be finite."""
    if not _must_be_finite(info):
        return
    values = np.frombuffer(raw, kernels.ARRAYS[info.dtype]).reshape(1, -1)
    if np.isfinite(kernels.amax_blocks(values, values.shape)).all():
        return
    _, place, value = _first_nonfinite(values)
    index = np.unravel_index(begin // ITEM_BYTES[info.dtype] + place, info.shape)
    raise _nonfinite(info, map(int, index), value)


def _first_nonfinite(weight: Array) -> tuple[int, int, float]:
    """Row, column and value of the first NaN or Inf, of which there is one."""
    values = kernels.widened(weight)
    row, column = np.argwhere(~np.isfinite(values))[0]
    return int(row), int(column), float(values[row, column])


def _must_be_finite(info: TensorInfo) -> bool:
    """Whether a kept tensor is a weight or bias. Buffers such as attention masks may hold anything, often -inf."""
    leaf = info.name.rpartition(".")[2]
    return info.dtype in FLOATS and (leaf in {"weight", "bias"} or leaf.endswith(_EXPERTS))


def _nonfinite(info: TensorInfo, index: Iterable[int], value: float) -> NonFiniteWeight:
    place = f"{info.shard}: {info.name}{list(index)}"
    return NonFiniteWeight(f"{place} is {value}; a model with such a weight cannot be quantized, repair the source")
