"""A thread's buffers and its stream on a GPU: the bytes are those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fp8pipe.quantize import numerics
from fp8pipe.quantize.engine.workbench import Workbench
from fp8pipe.quantize.kernels import Array


class GpuBench(Workbench):
    """Buffers are pinned, and the thread has a stream of its own, so that other threads read and write their stripes
    while this one's is transferred and encoded."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)

    def _buffer(self, size: int) -> Array:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def take(self, stripe: Array) -> Tensor:
        with self._own_stream():
            return numerics.tensor_of(stripe).to(self._device, non_blocking=True)

    def amax(self, stripe: Tensor, unit: tuple[int, int]) -> Array:
        with self._own_stream():
            return numerics.block_amax(stripe, unit).cpu().numpy()

    def encode(self, stripe: Tensor, scale: Array, unit: tuple[int, int]) -> Array:
        with self._own_stream():
            # On the device too where it is one number: CUDA would multiply by a CPU scalar's reciprocal.
            scales = torch.from_numpy(scale).to(self._device, non_blocking=True)
            codes = torch.empty(stripe.shape, dtype=torch.float8_e4m3fn, device=self._device)
            broadcasts = unit[1] >= stripe.shape[1] and len(scale) in (1, len(stripe))
            numerics.encode(stripe, scales, codes, block=None if broadcasts else unit)
            host = self.codes(*stripe.shape)
            torch.from_numpy(host).copy_(codes.view(torch.uint8), non_blocking=True)
        self._stream.synchronize()
        return host
