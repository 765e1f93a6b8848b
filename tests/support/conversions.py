"""Converting reference checkpoints in tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fp8pipe.convert import Conversion
from fp8pipe.stages import convert as convert_model
from support import reference_checkpoints as reference

Models = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

AT = "model.layers.1.mlp.up_proj"
"""The module that tests alter."""


def config_of(folder: Path) -> dict[str, Any]:
    """quantization_config of a checkpoint."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def weights_of(folder: Path) -> dict[str, str]:
    """sha256 of every safetensors file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def everything(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def to(method: str | None, source: Path, folder: Path) -> Conversion:
    """Convert `source` into `folder`; None replaces only legacy names."""
    record, written = convert_model(str(source), folder, to=method)  # type: ignore[arg-type]  # a plain string
    assert written == folder
    return record


def same(left: Tensors, right: Tensors) -> bool:
    """Whether names, dtypes, shapes and bits are equal."""
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype
        and left[n].shape == right[n].shape
        and torch.equal(left[n].reshape(-1).view(torch.uint8), right[n].reshape(-1).view(torch.uint8))
        for n in left
    )


def edit(folder: Path, change: Callable[[Tensors, dict[str, Any]], None], shards: int = 1) -> Path:
    """Rewrite a reference checkpoint after `change` has altered its tensors and its quantization_config."""
    tensors, config = reference.read(folder)
    change(tensors, config["quantization_config"])
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    return reference.write(folder, tensors, config, shards, {})


def rename(tensors: Tensors, old: str, new: str) -> int:
    """Replace the ending `old` of names by `new`; how many there were."""
    names = [name for name in tensors if name.endswith(old)]
    for name in names:
        tensors[name.removesuffix(old) + new] = tensors.pop(name)
    return len(names)
