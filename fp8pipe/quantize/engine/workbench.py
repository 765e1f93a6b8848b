"""A thread's own buffers for the stripe it works on, and the arithmetic: on the CPU here, on a GPU in gpu_bench."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from fp8pipe.quantize import kernels
from fp8pipe.quantize.kernels import Array

Stripe = Any
"""A stripe where the arithmetic is done: an array of ../kernels.py, or a tensor on a GPU."""


class Workbench(threading.local):
    """One thread's buffers, grown to the largest stripe and reused."""

    def __init__(self) -> None:
        self._raw = self._codes = np.empty(0, np.uint8)

    def _buffer(self, size: int) -> Array:
        return np.empty(size, np.uint8)

    def raw(self, size: int) -> memoryview:
        """A buffer for `size` source bytes, valid until the next call."""
        if len(self._raw) < size:
            self._raw = self._buffer(size)
        return self._raw.data[:size]

    def codes(self, rows: int, columns: int) -> Array:
        """A buffer for codes, uint8 [rows, columns], valid until the next call."""
        if len(self._codes) < rows * columns:
            self._codes = self._buffer(rows * columns)
        return self._codes[: rows * columns].reshape(rows, columns)

    def take(self, stripe: Array) -> Stripe:
        """`stripe` [rows, columns], an array of ../kernels.py, where the arithmetic is done."""
        return stripe

    def amax(self, stripe: Stripe, unit: tuple[int, int]) -> Array:
        """Largest magnitude in each unit of (rows, columns), float32 [ceil(rows/unit), ceil(columns/unit)]."""
        return kernels.amax_blocks(stripe, unit)

    def encode(self, stripe: Stripe, scale: Array, unit: tuple[int, int]) -> Array:
        """E4M3 codes, uint8 [rows, columns], valid until the next call. `scale`: as the shape of `amax`."""
        codes = self.codes(*stripe.shape)
        kernels.encode_blocks(stripe, scale, codes, unit)
        return codes
