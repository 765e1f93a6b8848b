"""Quantizing tiny models in tests: one call, what it wrote, and the naive reference to compare it with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8pipe.config import Recipe, WeightScheme
from fp8pipe.hub.source import resolve
from fp8pipe.quantize import quantize
from fp8pipe.quantize.numerics import SHRINKS
from fp8pipe.quantize.plan import Plan, Slice
from fp8pipe.records import Checkpoint
from support.numerics import expanded, reference_amax, reference_codes, reference_scale
from support.tiny_models import calibration_for, plan_of

Models = Callable[..., Path]
"""The fixture `model_folder`."""

SCHEMES: dict[str, dict[str, Any]] = {
    "channel": {},
    "tensor": {"weights": {"strategy": "tensor"}},
    "tensor, own scales": {"weights": {"strategy": "tensor", "share_scales": False}},
    "block": {"weights": {"strategy": "block"}, "activations": {"mode": "dynamic", "strategy": "group"}},
    "channel mse": {"weights": {"strategy": "channel", "observer": "mse"}},
    "tensor mse": {"weights": {"strategy": "tensor", "observer": "mse"}},
    "block mse": {"weights": {"strategy": "block", "observer": "mse"}},
    "block exact": {"weights": {"strategy": "block", "scales": "exact"}},
    "block exact mse": {"weights": {"strategy": "block", "scales": "exact", "observer": "mse"}},
    "fp8 block": {"weights": {"strategy": "block"}, "checkpoint_format": "fp8"},
    "fp8 tensor": {"weights": {"strategy": "tensor"}, "checkpoint_format": "fp8"},
    "weight only": {"activations": None},
}
"""What each scheme changes in the recipe fp8-dynamic."""


def make(source: Path, wanted: Recipe, out: Path, **options: Any) -> tuple[Plan, Checkpoint]:
    """Plan and quantize `source` into `out`, with made-up ranges where the recipe is calibrated."""
    plan = plan_of(source, wanted)
    calibration = calibration_for(plan) if wanted.needs_calibration else None
    return plan, quantize(resolve(str(source)), plan, out, calibration=calibration, **options)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def kept(plan: Plan) -> dict[str, str]:
    """Tensors that stay unquantized -> why."""
    return {tensor.name: tensor.reason for tensor in plan.tensors if tensor.action == "keep"}


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite model.safetensors after `change` has altered its tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    """Set values in config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def bytes_of(folder: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint; the seconds in checkpoint.json are left out."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    record = json.loads((folder / "fp8pipe" / "checkpoint.json").read_text())
    found["fp8pipe/checkpoint.json"] = json.dumps(record | {"seconds": 0})
    return found


def journalled(out: Path) -> set[str]:
    """Output tensors that the journal lists as finished; asserts that it lists none twice."""
    path = out / "fp8pipe" / "quantize.journal"
    if not path.exists():
        return set()
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[1:-1]]
    names = [line["weight"] for line in lines if "weight" in line]
    assert len(names) == len(set(names))
    return set(names)


# ---------------------------------------------------------------------------------------------- the reference


def assert_equals_reference(source: dict[str, Tensor], made: dict[str, Tensor], plan: Plan) -> None:
    """Every output of `plan` has the bytes that the formulas give, computed on whole tensors."""
    scheme = plan.settings.weights
    block = scheme.block_shape if scheme.strategy == "block" else None
    groups: dict[str, list[Any]] = {}
    for output in plan.outputs:
        if output.role == "copy":
            assert same_bytes(made[output.name], source[output.source]), output.name
        if output.role == "weight":
            together = scheme.strategy == "tensor" and scheme.share_scales and output.group
            groups.setdefault(output.group if together else output.name, []).append(output)
    scale_of = {output.module: output.name for output in plan.outputs if output.role == "weight_scale"}
    for members in groups.values():
        weights = [weight_behind(source[output.source], output.slice, output.shape[0]) for output in members]
        for output, weight, scale in zip(members, weights, reference_scales(weights, scheme), strict=True):
            found = made[scale_of[output.module]]
            assert found.dtype == torch.float32
            assert torch.equal(found.flatten(), scale.flatten()), output.name
            assert same_bytes(made[output.name], reference_codes(weight, scale, block)), output.name


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def weight_behind(tensor: Tensor, part: Slice | None, rows: int) -> Tensor:
    """The Linear weight [rows, in] that a slice of a 3-D tensor means, by plain indexing."""
    if part is None:
        return tensor
    matrix = tensor[part.expert].T if part.transposed else tensor[part.expert]
    return matrix[part.start :: part.step][:rows]


def reference_scales(weights: list[Tensor], scheme: WeightScheme) -> list[Tensor]:
    """Scales of weights that share a range: joint amax per tensor, own per row or block; mse by trying all."""
    block = scheme.block_shape
    amaxes = [reference_amax(weight, scheme.strategy, block) for weight in weights]
    if scheme.strategy == "tensor":
        amaxes = [torch.stack(amaxes).max()] * len(weights)
    if scheme.observer == "minmax":
        return [reference_scale(amax, scheme.scales) for amax in amaxes]
    best_scales: list[Tensor] = []
    best_errors: list[Tensor] = []
    for shrink in SHRINKS:
        scales = [reference_scale(amax * torch.tensor(shrink), scheme.scales) for amax in amaxes]
        errors = [squared_errors(weight, scale, scheme) for weight, scale in zip(weights, scales, strict=True)]
        if scheme.strategy == "tensor":
            errors = [torch.stack(errors).sum()] * len(weights)
        if not best_scales:
            best_scales, best_errors = scales, errors
        better = [error < best for error, best in zip(errors, best_errors, strict=True)]
        best_scales = [torch.where(*pair) for pair in zip(better, scales, best_scales, strict=True)]
        best_errors = [torch.where(*pair) for pair in zip(better, errors, best_errors, strict=True)]
    return best_scales


def squared_errors(weight: Tensor, scale: Tensor, scheme: WeightScheme) -> Tensor:
    """Squared error of the dequantized weight, float64: one sum per tensor, row or block."""
    block = scheme.block_shape
    full = expanded(scale, block, weight) if scheme.strategy == "block" else scale
    codes = (weight.float() / full).clamp(-448, 448).to(torch.float8_e4m3fn)
    squares = (codes.float() * full - weight.float()).double().square()
    if scheme.strategy == "tensor":
        return squares.sum()
    if scheme.strategy == "channel":
        return squares.sum(1, keepdim=True)
    bands = [torch.stack([piece.sum() for piece in band.split(block[1], 1)]) for band in squares.split(block[0], 0)]
    return torch.stack(bands)
