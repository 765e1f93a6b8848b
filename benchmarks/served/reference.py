"""What the source model answers, run by transformers in float32.

In: a checkpoint folder. Out: a `Reference` with the logits of fixed prompts, the experts that each token was routed to,
and the projection whose weights matter most, which the sabotaged copy doubles.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.served import models

if TYPE_CHECKING:
    from torch import nn

PROMPTS = models.sequences(4, 24, seed=2)
SCORED = len(PROMPTS[0]) - 1
"""Positions of each prompt that are scored: vLLM returns the logits of those that predict a prompt token."""


@dataclass(frozen=True)
class Reference:
    """The source's answers."""

    logits: np.ndarray
    """[prompts x positions, vocabulary] float32."""
    routing: np.ndarray | None
    """[prompts x positions, layers, top_k], sorted indices of experts; None without sparse experts."""
    telling: tuple[str, ...]
    """Patterns of modules, one for each kind of projection in the last layer, ordered by how much doubling its weights
    changes the logits, most first."""


def reference(folder: Path) -> Reference:
    """Run the source, and again with each kind of projection in the last layer doubled."""
    logits, routing = answers(folder)
    effects = {leaf: relative_error(answers(folder, leaf)[0], logits) for leaf in _projections(folder)}
    return Reference(logits, routing, tuple(sorted(effects, key=lambda leaf: -effects[leaf])))


def relative_error(logits: np.ndarray, source: np.ndarray) -> float:
    """L2 norm of the difference of logits over that of the source's, both centred because softmax ignores a shift."""
    ours, theirs = (x - x.mean(axis=-1, keepdims=True) for x in (logits, source))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def answers(folder: Path, doubled: str | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """(logits, routing) of the model in `folder`, with the weights that match `doubled` multiplied by 2."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        place = folder if doubled is None else _with_doubled(folder, Path(scratch), doubled)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager").eval()
    chosen: list[Any] = []
    for module in model.modules():
        if _routes(module):
            module.register_forward_pre_hook(_capture(chosen), with_kwargs=True)
    with torch.inference_mode():
        logits = model(torch.tensor(PROMPTS)).logits[:, :SCORED]
    experts = [x.reshape(len(PROMPTS), -1, x.shape[-1])[:, :SCORED].flatten(0, 1).sort().values for x in chosen]
    return logits.flatten(0, 1).numpy(), torch.stack(experts, dim=1).numpy() if experts else None


def _routes(module: nn.Module) -> bool:
    """Whether this is transformers' module of all experts, which is called with each token's choice of experts."""
    import inspect

    return "top_k_index" in inspect.signature(module.forward).parameters


def _capture(chosen: list[Any]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen.append(kwargs["top_k_index"] if "top_k_index" in kwargs else args[1])

    return hook


# ---------------------------------------------------------------------------------------------- the telling projection


def _projections(folder: Path) -> list[str]:
    """One pattern for each kind of Linear in the last layer that the data-free recipe quantizes."""
    from fp8pipe.config import load_recipe
    from fp8pipe.stages import pin
    from fp8pipe.stages import plan as plan_snapshot

    plan = plan_snapshot(pin(str(folder)), load_recipe("fp8-dynamic"))
    modules = [output.module for output in plan.outputs if output.role == "weight"]
    last = max(int(number) for module in modules for number in re.findall(r"layers\.(\d+)\.", module))
    leaves = {module.rpartition(".")[2] for module in modules if f"layers.{last}." in module}
    return [rf".*layers\.{last}\..*\b{leaf}" for leaf in sorted(leaves)]


def _with_doubled(folder: Path, copy: Path, pattern: str) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy, dirs_exist_ok=True)
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        hit = {name for name in tensors if re.fullmatch(pattern, name.removesuffix(".weight"))}
        changed = {name: tensor * 2 if name in hit else tensor for name, tensor in tensors.items()}
        save_file(changed, path, metadata={"format": "pt"})
    return copy
