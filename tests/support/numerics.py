"""The formulas of FP8 as the papers write them, on whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_amax(weight: Tensor, strategy: str, block: tuple[int, int] = (128, 128)) -> Tensor:
    """Largest magnitude of the tensor [], of each row [out, 1], or of each block [blocks, blocks]."""
    magnitude = weight.float().abs()
    if strategy == "tensor":
        return magnitude.max()
    if strategy == "channel":
        return magnitude.max(dim=1, keepdim=True).values
    rows, columns = block
    return torch.stack(
        [torch.stack([piece.max() for piece in band.split(columns, 1)]) for band in magnitude.split(rows, 0)]
    )


def reference_scale(amax: Tensor, scales: str = "exact") -> Tensor:
    """amax / 448, float32; or the least power of two that is not below it."""
    scale = amax.clamp(min=1e-12) / 448
    return scale if scales == "exact" else torch.exp2(torch.ceil(torch.log2(scale.double()))).float()


def reference_codes(weight: Tensor, scale: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """E4M3 codes of a weight [out, in]."""
    if block is not None:
        scale = expanded(scale, block, weight)
    return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def expanded(scale: Tensor, block: tuple[int, int], weight: Tensor) -> Tensor:
    """Block scales, repeated for each element of `weight`."""
    rows, columns = block
    return scale.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
