"""The formulas of FP8 as the papers write them."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_amax(weight: Tensor, strategy: str, block: tuple[int, int] = (128, 128)) -> Tensor:
    magnitude = weight.float().abs()
    if strategy == "tensor":
        return magnitude.max()
    if strategy == "channel":
        return magnitude.max(dim=1, keepdim=True).values
    rows, columns = block
    return torch.stack(
        [torch.stack([piece.max() for piece in band.split(columns, 1)]) for band in magnitude.split(rows, 0)]
    )


def reference_codes(weight: Tensor, scale: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """The formula as the papers write it."""
    if block is not None:
        rows, columns = block
        scale = scale.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
