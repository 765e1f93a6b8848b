"""Ranges of a model that is in memory as a whole, found by plain hooks and an ordinary cache: the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import DynamicCache

from fp8pipe.records.calibration import Calibration
from support.calibration import TEXTS

CLOSE = 1e-6
"""Relative. Both sides compute in float32; only the order of sums may differ."""


def linear_reference(model: Any, token_ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """Name of every Linear -> amax of its input."""
    amax: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(_: nn.Module, args: Any, name: str = name) -> None:
                amax[name] = max(amax.get(name, 0.0), args[0].abs().max().item())

            handles.append(module.register_forward_pre_hook(hook))
    with torch.inference_mode():
        for ids in token_ids:
            model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return amax


def cache_reference(model: Any, token_ids: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each layer the amax of K and of V per head, from an ordinary cache that keeps everything."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.inference_mode():
        for ids in token_ids:
            cache: Any = DynamicCache()
            model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            layers = [(layer.keys.abs().amax((0, 2, 3)), layer.values.abs().amax((0, 2, 3))) for layer in cache.layers]
            pairs = zip(found or layers, layers, strict=True)
            found = [(torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])) for a, b in pairs]
    return found


def expert_reference(model: Any, token_ids: Sequence[Sequence[int]]) -> dict[tuple[str, int], tuple[float, float]]:
    """Experts module and expert -> amax of its input, and of its down projection's input."""
    amax: dict[tuple[str, int], tuple[float, float]] = {}

    def hook(module: Any, args: Any, name: str) -> None:
        hidden, index = args[0], args[1]
        for expert in range(module.num_experts):
            given = hidden[(index == expert).any(dim=1)]
            if len(given):
                gate, up = (given @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                inner = module.act_fn(gate) * up
                old = amax.get((name, expert), (0.0, 0.0))
                amax[name, expert] = max(old[0], given.abs().max().item()), max(old[1], inner.abs().max().item())

    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            module.register_forward_pre_hook(lambda module, args, name=name: hook(module, args, name))
    with torch.inference_mode():
        for ids in token_ids:
            model(torch.tensor([ids]), use_cache=False)
    return amax


def block_reference(model: Any, token_ids: Sequence[Sequence[int]]) -> dict[tuple[str, int], tuple[float, float]]:
    """`expert_reference` for Llama 4, whose experts get one block of tokens each."""
    amax: dict[tuple[str, int], tuple[float, float]] = {}

    def hook(module: Any, args: Any, name: str) -> None:
        given = args[0].view(module.num_experts, -1, args[0].shape[-1])
        gate, up = torch.bmm(given, module.gate_up_proj).chunk(2, dim=-1)
        for expert, (block, inner) in enumerate(zip(given, up * module.act_fn(gate), strict=True)):
            old = amax.get((name, expert), (0.0, 0.0))
            amax[name, expert] = max(old[0], block.abs().max().item()), max(old[1], inner.abs().max().item())

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda module, args, name=name: hook(module, args, name))
    with torch.inference_mode():
        for ids in token_ids:
            model(torch.tensor([ids]), use_cache=False)
    return amax


def token_ids_of(calibration: Calibration) -> list[list[int]]:
    """TEXTS under the byte tokenizer, in the order in which they were run."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = {symbol: i for i, symbol in enumerate(alphabet)}
    texts = [TEXTS[index] for index in calibration.sample_indices]
    return [[symbols["Ġ" if char == " " else char] for char in text][: calibration.max_seq_len] for text in texts]
