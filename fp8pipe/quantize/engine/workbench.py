"""A thread's own buffers for the stripe it works on, and its stream on a GPU."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class Workbench(threading.local):
    """One thread's buffers, grown to the largest stripe and reused.

    On a GPU they are pinned and the thread has a stream of its own, so that other threads read and write their stripes
    while this one's is transferred and encoded. The bytes are those of the CPU."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._on_gpu else None
        self._raw = self._codes = self._buffer(0)

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu)

    def raw(self, size: int) -> memoryview:
        """A buffer for `size` source bytes, valid until the next call."""
        if len(self._raw) < size:
            self._raw = self._buffer(size)
        return self._raw.numpy().data[:size]

    def stream(self) -> AbstractContextManager[object]:
        """A context in which work on the GPU goes through this thread's stream."""
        return torch.cuda.stream(self._stream) if self._on_gpu else nullcontext()

    def to_device(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device that does the arithmetic. Scalars too: CUDA would multiply by a CPU scalar's
        reciprocal."""
        return tensor.to(self._device, non_blocking=True)

    def codes(self, rows: int, columns: int) -> Tensor:
        """A buffer for codes on the device, float8_e4m3fn [rows, columns]."""
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
            self._codes = self._buffer(rows * columns)
        return self._codes[: rows * columns].view(torch.float8_e4m3fn).view(rows, columns)
