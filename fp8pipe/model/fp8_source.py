"""A source that is FP8 already: which tensor holds a weight's scales, what each scale covers, and what the weight is.

    weight [out, in] = codes * scale                  float32; one scale per tensor, per row, or per block

The plan decides from headers (`block_shape`, `require_scale`); the engine, calibration and validation read the values
(`grid_of`, `dequantize`). AutoFP8 writes one scale per tensor, DeepSeek one per block of [128, 128].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8pipe.errors import InputError
from fp8pipe.model.headers import TensorInfo
from fp8pipe.model.names import FLOATS, FP8, SCALE_NAMES, SPENT_NAMES

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Block = tuple[int, int]
"""Rows and columns."""

SCALE_DTYPES = (*FLOATS, "F8_E8M0")
"""Dtypes that the scales of an FP8 source may have."""


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """How scales cover a weight [out, in]."""

    shape: Block
    """Rows and columns of scales."""
    unit: Block
    """Rows and columns of the weight under one scale; the last ones may reach beyond the weight."""


# ---------------------------------------------------------------------------------------------- from headers


def block_shape(quantization: Mapping[str, Any] | None) -> Block | None:
    """`weight_block_size` of a source's quantization_config; None for scales per tensor or row. Raises InputError."""
    value = (quantization or {}).get("weight_block_size")
    block = as_block(value)
    if value is not None and block is None:
        raise InputError(f"config.json: weight_block_size is {value!r}, expected two sizes such as [128, 128]")
    return block


def as_block(value: object) -> Block | None:
    """`value` if it is a list of two positive sizes, else None."""
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    return None


def holds_codes(info: TensorInfo) -> bool:
    """Whether a tensor is 8-bit floating point and not itself a scale."""
    return info.dtype.startswith("F8_") and info.name.rpartition(".")[2] not in SPENT_NAMES


def scale_of(weight: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The tensor with the scales of `weight` (its full name, ending in `.weight`); None if there is none."""
    module = weight.removesuffix(".weight")
    return next((tensors[name] for leaf in SCALE_NAMES if (name := f"{module}.{leaf}") in tensors), None)


def require_scale(weight: TensorInfo, tensors: Mapping[str, TensorInfo], block: Block | None) -> TensorInfo:
    """The tensor with the scales of an FP8 weight, whose dtype and shape leave no doubt what they cover.

    Raises InputError for codes that are no 2-D E4M3 weight, and for scales that are missing or do not fit."""
    if weight.dtype != FP8 or len(weight.shape) != 2 or not weight.name.endswith(".weight"):
        raise InputError(
            f"{weight.name}: {weight.dtype} {list(weight.shape)}; in an FP8 source only 2-D {FP8} tensors named "
            "*.weight can be read; start from the unquantized model"
        )
    found = scale_of(weight.name, tensors)
    if found is None:
        raise InputError(
            f"{weight.name}: {FP8} without {' or '.join(SCALE_NAMES)}, so its values are unknown; "
            "start from the unquantized model"
        )
    allowed = _allowed_shapes(weight.shape, block)
    if found.dtype not in SCALE_DTYPES or found.shape not in allowed:
        layout = f"blocks of {list(block)}" if block is not None else "config.json has no weight_block_size"
        expected = " or ".join(str(list(shape)) for shape in allowed)
        raise InputError(
            f"{found.name}: {found.dtype} {list(found.shape)} for a weight of {list(weight.shape)}, expected "
            f"{', '.join(SCALE_DTYPES)} of shape {expected} ({layout}); the source does not fit its config.json"
        )
    return found


def _allowed_shapes(weight: Shape, block: Block | None) -> list[Shape]:
    rows, _ = weight
    return [_blocks(weight, block)] if block is not None else [(), (1,), (1, 1), (rows,), (rows, 1)]


def _blocks(weight: Shape, block: Block) -> Block:
    return -(-weight[0] // block[0]), -(-weight[1] // block[1])


def grid_of(weight: Shape, scale: Shape, block: Block | None) -> ScaleGrid | None:
    """What the scales of shape `scale` cover of a weight [out, in]: all of it, a row each, or a block each.

    Reads more than `require_scale` allows: `block` is what config.json says, and scales of another shape may still be
    one per tensor or row. None if they cannot be understood."""
    rows, columns = weight
    if scale in ((), (1,), (1, 1)):
        return ScaleGrid((1, 1), (max(1, rows), max(1, columns)))
    if scale in ((rows,), (rows, 1)) and (block is None or columns > block[1]):
        return ScaleGrid((rows, 1), (1, max(1, columns)))
    if block is not None and scale == _blocks(weight, block):
        return ScaleGrid(_blocks(weight, block), block)
    return None


# ---------------------------------------------------------------------------------------------- values


def scale_values(raw: bytearray | memoryview, dtype: str, grid: ScaleGrid) -> Tensor:
    """Scales as float32 [rows, columns] of the grid, from their bytes."""
    import torch

    from fp8pipe.model.dtypes import DTYPES

    return torch.frombuffer(raw, dtype=DTYPES[dtype]).float().view(grid.shape)


def dequantize(codes: Tensor, scales: Tensor, unit: Block, *, first_row: int = 0) -> Tensor:
    """Rows [first_row, first_row + n) of a weight, float32 [n, in].

    `codes`: those rows, float8_e4m3fn [n, in]. `scales`: float32 [grid rows, grid columns] of the whole weight. `unit`:
    rows and columns under one scale."""
    import torch

    height, width = unit
    multipliers = scales[torch.arange(first_row, first_row + len(codes)) // height]
    if width < codes.shape[1]:
        multipliers = multipliers.repeat_interleave(width, 1)[:, : codes.shape[1]]
    return codes.float().mul_(multipliers)
