"""16-bit Linears on a CPU without instructions for them: multiplied in float32, rounded once.

A 16-bit product is defined that way anyway: float32 sums, the result rounded. On a CPU without AVX512-BF16 and AMX,
torch's own kernels take four times as long as float32 for bf16 and nine times for fp16; converting the weights in each
pass of 1024 tokens costs 5 %. Attention is left to torch, which is as fast there in 16 bits as in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WEIGHTS_AT_ONCE = 1 << 23
"""How many weights are converted to float32 at once: 32 MiB of them. Fewer rows are slower to multiply."""

NATIVE: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    torch.float16: lambda: torch.cpu._is_amx_fp16_supported() or torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
"""Whether this CPU has instructions to multiply a 16-bit type."""


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` multiplies `dtype` more slowly than float32."""
    return device.type == "cpu" and dtype in NATIVE and not NATIVE[dtype]()


def fast_products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Context in which this thread computes Linears of `dtype` in float32, if that is faster on `device`."""
    return _InFloat32(dtype) if is_emulated(dtype, device) else nullcontext()


class _InFloat32(TorchFunctionMode):
    """Replaces torch.nn.functional.linear for `dtype`, also where experts or a model's own code call it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and args[0].dtype == self._dtype:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """values [..., in], weight [out, in], bias [out]."""
        flat = values.reshape(-1, values.shape[-1])
        wide, product = self._wide("values", flat), flat.new_empty(len(flat), len(weight))
        height = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
        for start in range(0, len(weight), height):
            rows = weight[start : start + height]
            part = torch.mm(wide, self._wide("rows", rows).T, out=self._buffer("part", len(flat), len(rows)))
            if bias is not None:
                part += bias[start : start + height]
            product[:, start : start + height] = part
        return product.view(*values.shape[:-1], len(weight))

    def _wide(self, use: str, matrix: Tensor) -> Tensor:
        """`matrix` as float32."""
        return self._buffer(use, *matrix.shape).copy_(matrix)

    def _buffer(self, use: str, height: int, width: int) -> Tensor:
        """float32 [height, width] in memory that is reused: allocating a block takes as long as filling it."""
        if use not in self._buffers or height * width > len(self._buffers[use]):
            self._buffers[use] = torch.empty(height * width)
        return self._buffers[use][: height * width].view(height, width)
