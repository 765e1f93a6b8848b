"""A predicting layer beside a model that transformers builds without it, as the files of such models have it.

In: a saved model whose class names, among the keys that it leaves unread, those of multi-token prediction. Out: the
root of the layer that was added, a copy of the last decoder layer. Whether a checkpoint keeps it in 16 bits and leaves
it out of quantization is read from the checkpoint's files alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from benchmarks.zoo.own import PREDICTORS

_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")
_NAMED = ("mtp.layers.0", "model.mtp.layers.0", "model.mtp_layers.0", "model.mtp_block.0")


def add(model: PreTrainedModel, folder: Path) -> str:
    """Write the layer beside the model's shards; the root of its names, or empty if the class knows of none."""
    names = _names(folder)
    layers = [(match[1], int(match[2])) for name in names if (match := re.match(r"(.*?layers)\.(\d+)\.", name))]
    patterns = [str(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    if not layers or not patterns:
        return ""
    prefix, last = max(layers, key=lambda layer: layer[1])
    root = PREDICTORS.get(model.config.model_type) or _root(patterns, prefix, last + 1)
    if not root:
        return ""
    start = f"{prefix}.{last}."
    copied = {f"{root}.{name.removeprefix(start)}": name for name in names if name.startswith(start)}
    tensors = {new: _tensor(folder / names[old], old) for new, old in copied.items()}
    width = model.config.get_text_config(decoder=True).hidden_size
    if root.startswith(f"{prefix}."):
        tensors[f"{root}.eh_proj.weight"] = torch.randn(width, 2 * width).to(torch.bfloat16)
    save_file(tensors, folder / "predictor.safetensors", metadata={"format": "pt"})
    _write_index(folder, names | dict.fromkeys(tensors, "predictor.safetensors"))
    _count_in_config(folder / "config.json")
    return root


def kept(folder: Path, root: str) -> str:
    """Why the layer at `root` is not one that is kept; empty if every tensor is in 16 bits or more and no name of a
    module below it escapes the ignore list."""
    names = _names(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    ignore = config.get("ignore") or config.get("ignored_layers") or []
    below = [name for name in names if name.startswith(f"{root}.")]
    if not below:
        return f"{root} is gone"
    for name in below:
        module = name.rpartition(".")[0]
        matrix = _tensor(folder / names[name], name)
        if matrix.dtype.itemsize < 2:
            return f"{name} is {matrix.dtype}"
        if name.endswith(".weight") and matrix.dim() == 2 and not any(_covers(entry, module) for entry in ignore):
            return f"no entry of ignore covers {module}"
    return ""


def _covers(entry: str, module: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), module) is not None
    return f"{module}.".startswith(f"{entry}.")


def _root(patterns: list[str], prefix: str, number: int) -> str:
    if any(re.search(r"layers\\\.\d+", pattern) for pattern in patterns):
        return f"{prefix}.{number}"
    names = (name for name in _NAMED if any(re.search(pattern, f"{name}.") for pattern in patterns))
    return next(names, "")


def _names(folder: Path) -> dict[str, str]:
    """Tensor -> file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return json.loads(index.read_text())["weight_map"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _write_index(folder: Path, names: dict[str, str]) -> None:
    size = sum((folder / file).stat().st_size for file in set(names.values()))
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _count_in_config(path: Path) -> None:
    """Set the number of predicting layers to one, wherever the config has such a key."""

    def with_count(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {key: 1 if key in _COUNTS else with_count(value) for key, value in node.items()}

    path.write_text(json.dumps(with_count(json.loads(path.read_text())), indent=2))
