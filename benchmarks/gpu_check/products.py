"""Products: torch's own FP8 kernels give the products of BF16 when they are given our codes and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu_check.row import Row, peak_row, seconds
from fp8pipe.quantize import numerics

_MOST = 0.06
"""Relative L2 error of a W8A8 product of normal values: both sides are rounded to a step of 1/8 and less."""
_EXACT = 0.01
"""Relative L2 error against the same codes and scales multiplied in float32: the rounding of the BF16 result."""
BLOCK = 128
PER_CHANNEL, IN_BLOCKS = "per channel and token", "in blocks"


def rows(device: torch.device, *, quick: bool) -> Iterator[Row]:
    """Per tensor, per channel and token, in blocks."""
    tokens, width, out = (32, 512, 384) if quick else (4096, 8192, 8192)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(tokens, width, generator=generator).bfloat16().to(device)
    w = (torch.randn(out, width, generator=generator) * 0.02).bfloat16().to(device)
    whole = x.float() @ w.float().T
    baseline = seconds(lambda: x @ w.T, device)
    operations = 2 * tokens * width * out
    yield Row("product in bf16", f"{operations / baseline / 1e12:.1f} TFLOP/s", value=operations / baseline)
    for name, inputs, weights in (
        ("per tensor", (tokens, width), (out, width)),
        (PER_CHANNEL, (1, width), (1, width)),
        (IN_BLOCKS, (1, BLOCK), (BLOCK, BLOCK)),
    ):
        yield _row(name, _Codes(x, inputs), _Codes(w, weights), whole, operations, device)
    yield from peak_row("products", device)


class _Codes:
    """A matrix [rows, columns] as codes and scales, one for each unit of (rows, columns)."""

    def __init__(self, matrix: Tensor, unit: tuple[int, int]) -> None:
        scale = numerics.weight_scale(numerics.block_amax(matrix, unit))
        self.codes = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn, device=matrix.device)
        numerics.encode(matrix, scale, self.codes, block=unit)
        self.scale, self.unit = scale, unit

    def values(self) -> Tensor:
        return numerics.dequantize(self.codes, self.scale, block=self.unit)


def _row(name: str, x: _Codes, w: _Codes, whole: Tensor, operations: int, device: torch.device) -> Row:
    work = _scaled_mm(x, w)
    try:
        found = work().float()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        optional = name == IN_BLOCKS  # not in every torch, nor on every device
        missing = f"not available: {str(error).splitlines()[0][:90]}"
        return Row(f"torch._scaled_mm {name}", missing, "" if optional else "available", optional)
    off, exact = _distance(found, whole), _distance(found, x.values() @ w.values().T)
    rate = operations / seconds(work, device) / 1e12
    return Row(
        f"torch._scaled_mm {name}",
        f"{off:.3f} off bf16, {exact:.4f} off float32 on the same codes; {rate:.1f} TFLOP/s",
        f"{_MOST}, {_EXACT}",
        off <= _MOST and exact <= _EXACT,
        off,
    )


def _scaled_mm(x: _Codes, w: _Codes) -> Callable[[], Tensor]:
    """x [tokens, in] by w [out, in]. cuBLAS wants the scales of 1 x 128 blocks with their columns outermost."""
    x_scale, w_scale = x.scale, w.scale.T
    if x.unit[1] == BLOCK:
        x_scale = x_scale.T.contiguous().T
    if x.scale.numel() == 1:
        x_scale, w_scale = x_scale.reshape(()), w_scale.reshape(())
    multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]  torch has no public name for it
    return lambda: multiply(x.codes, w.codes.T, x_scale, w_scale, out_dtype=torch.bfloat16)


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
