"""Linear layers in 16 bits on a CPU that has no instructions for them: multiplied in float32, rounded once.

That is what a 16-bit product is anyway: sums in float32, the result rounded. torch's kernels for such a CPU (no
AVX512-BF16, no AMX) take four times as long as float32 in bf16, nine times in fp16; converting the weights at each pass
of 1024 tokens costs one part in twenty. Attention is left to torch: there the two are equally fast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ROOM = 1 << 23
"""Weights that are float32 at once: 32 MiB. Fewer rows at a time are slower to multiply."""

_NATIVE: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    torch.float16: lambda: torch.cpu._is_amx_fp16_supported() or torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
"""Whether this CPU multiplies a 16-bit type."""


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of `dtype` are slower on `device` than those of float32."""
    return device.type == "cpu" and dtype in _NATIVE and not _NATIVE[dtype]()


def fast_products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Context in which this thread's Linears of `dtype` are computed in float32, if that is faster on `device`."""
    return _InFloat32(dtype) if is_emulated(dtype, device) else nullcontext()


class _InFloat32(TorchFunctionMode):
    """torch.nn.functional.linear of `dtype`, whoever calls it: modules, experts, a model's own code."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._rooms: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and args[0].dtype == self._dtype:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """values [..., in], weight [out, in], bias [out]."""
        flat = values.reshape(-1, values.shape[-1])
        wide, product = self._wide("values", flat), flat.new_empty(len(flat), len(weight))
        height = max(1, _ROOM // weight.shape[1])
        for start in range(0, len(weight), height):
            rows = weight[start : start + height]
            part = torch.mm(wide, self._wide("rows", rows).T, out=self._room("part", len(flat), len(rows)))
            if bias is not None:
                part += bias[start : start + height]
            product[:, start : start + height] = part
        return product.view(*values.shape[:-1], len(weight))

    def _wide(self, use: str, matrix: Tensor) -> Tensor:
        """`matrix` as float32."""
        return self._room(use, *matrix.shape).copy_(matrix)

    def _room(self, use: str, height: int, width: int) -> Tensor:
        """float32 [height, width] in memory that is taken once: a fresh block costs as much as filling it does."""
        if use not in self._rooms or height * width > len(self._rooms[use]):
            self._rooms[use] = torch.empty(height * width)
        return self._rooms[use][: height * width].view(height, width)
