"""Tensors that stay unquantized: copied byte for byte, or dequantized to BF16 where the source is FP8."""

from __future__ import annotations

from functools import partial

import numpy as np

from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.quantize import kernels
from fp8pipe.quantize.engine.context import Context
from fp8pipe.quantize.engine.finite import refuse_nonfinite, refuse_nonfinite_bytes
from fp8pipe.quantize.engine.views import STRIPE_BYTES, WeightView
from fp8pipe.quantize.kernels import Array
from fp8pipe.quantize.plan import OutputTensor


class KeptTensors:
    """Queues the stripes of kept tensors."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def copy(self, info: TensorInfo, output: OutputTensor) -> None:
        """Copy source tensor `info` to `output`."""
        item = ITEM_BYTES[info.dtype]
        step = max(1, STRIPE_BYTES // item) * item  # whole elements
        spans = [(at, min(at + step, info.nbytes)) for at in range(0, info.nbytes, step)]
        tasks = [partial(self._copy_span, info, output, begin, end) for begin, end in spans]
        self._context.pool.add(tasks, then=partial(self._finish, info, output), urgent=True)

    def dequantize(self, view: WeightView, output: OutputTensor) -> None:
        """Write the FP8 weight of `view` to `output`, in the dtype of `output`."""
        tasks = [partial(self._dequantize_stripe, view, output, *rows) for rows in view.stripes(1)]
        self._context.pool.add(tasks, then=partial(self._finish, view.info, output), urgent=True)

    def _copy_span(self, info: TensorInfo, output: OutputTensor, begin: int, end: int) -> None:
        context = self._context
        raw = context.bench.raw(end - begin)
        context.files.read_into(info.shard, info.begin + begin, raw, info.name)
        refuse_nonfinite_bytes(info, raw, begin)
        context.shards[output.shard].write_at(output.begin + begin, raw, output.name)
        context.meter.add(end - begin)

    def _dequantize_stripe(self, view: WeightView, output: OutputTensor, start: int, end: int) -> None:
        context = self._context
        stripe = _cast(view.read(context.files, start, end, context.bench), output.dtype)
        refuse_nonfinite(view, stripe, start, kernels.amax_blocks(stripe, stripe.shape))
        raw = stripe.reshape(-1).view(np.uint8).data
        place = output.begin + start * view.columns * ITEM_BYTES[output.dtype]
        context.shards[output.shard].write_at(place, raw, output.name)
        context.meter.add((end - start) * view.row_bytes)

    def _finish(self, info: TensorInfo, output: OutputTensor) -> None:
        self._context.files.check_unchanged(info.shard)
        self._context.finish(output, [])


def _cast(stripe: Array, dtype: str) -> Array:
    """`stripe`, float32, in another dtype."""
    import torch

    from fp8pipe.model.dtypes import DTYPES
    from fp8pipe.quantize import numerics

    return numerics.array_of(torch.from_numpy(stripe).to(DTYPES[dtype]))
