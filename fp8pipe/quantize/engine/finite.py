"""Refuses weights that are not finite, naming the tensor and the index of the first bad element."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fp8pipe.errors import NonFiniteWeight
from fp8pipe.model.dtypes import DTYPES
from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.model.names import FLOATS
from fp8pipe.quantize import numerics
from fp8pipe.quantize.engine.views import WeightView

_EXPERTS = ("_proj", "_proj_bias")
"""Endings of tensors that hold all experts: `experts.gate_up_proj`."""


def refuse_nonfinite(view: WeightView, stripe: Tensor, start: int, amax: Tensor) -> None:
    """Raise NonFiniteWeight if `amax` of `stripe`, which begins at row `start` of the view, is not finite."""
    if bool(torch.isfinite(amax).all()):
        return
    found = numerics.first_nonfinite(stripe)
    assert found is not None
    raise _nonfinite(view.info, view.index_of(start + found[0], found[1]), float(stripe[found]))


def refuse_nonfinite_bytes(info: TensorInfo, raw: memoryview, begin: int) -> None:
    """The same for bytes of a tensor from byte `begin` on, if it is a tensor that must be finite."""
    if not _must_be_finite(info):
        return
    values = torch.frombuffer(raw, dtype=torch.uint8).view(DTYPES[info.dtype])
    if bool(torch.isfinite(numerics.tensor_amax(values.view(1, -1)))):
        return
    found = numerics.first_nonfinite(values)
    assert found is not None
    index = np.unravel_index(begin // ITEM_BYTES[info.dtype] + found[0], info.shape)
    raise _nonfinite(info, map(int, index), float(values[found]))


def _must_be_finite(info: TensorInfo) -> bool:
    """Whether a kept tensor is a weight or bias. Buffers such as attention masks may hold anything, often -inf."""
    leaf = info.name.rpartition(".")[2]
    return info.dtype in FLOATS and (leaf in {"weight", "bias"} or leaf.endswith(_EXPERTS))


def _nonfinite(info: TensorInfo, index: Iterable[int], value: float) -> NonFiniteWeight:
    place = f"{info.shard}: {info.name}{list(index)}"
    return NonFiniteWeight(f"{place} is {value}; a model with such a weight cannot be quantized, repair the source")
