"""transformers' logits with the checkpoint's weights, dequantized, against those with the source's.

In: the model, and both sides' weights as transformers' own loader maps them. Out: the relative error of the logits. The
model runs in float32, so that only the weights differ.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.zoo.models import prompts
from fp8pipe.oracle.loaded import group_of
from fp8pipe.oracle.loaded_probe import Side


@torch.inference_mode()
def error(model: PreTrainedModel, ours: Side, theirs: Side) -> float | None:
    """Median over tokens of the L2 error of the centred logits, relative to the source's; None if the model does not
    take text alone. The median, because a token that a router sends elsewhere tells nothing about its weights."""
    source = _logits(model, theirs)
    if source is None:
        return None
    mine = _logits(model, ours)
    assert mine is not None, "the same model and the same tokens"
    a, b = (x - x.mean(dim=-1, keepdim=True) for x in (mine, source))
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).nan_to_num(nan=torch.inf).median())


def _logits(model: PreTrainedModel, side: Side) -> Tensor | None:
    """[tokens, vocabulary], with the weights of `side` in the model."""
    runs = model.float()
    put(runs, side)
    tokens = torch.tensor(prompts(2, 24, seed=2))
    try:
        found = runs(input_ids=tokens, use_cache=False).logits
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # it needs images, sound or another sequence
    return found.float().flatten(0, 1) if found.dim() == 3 else None


def put(model: PreTrainedModel, side: Side) -> None:
    """Every parameter that `side` fills."""
    state = model.state_dict()
    for group in dict.fromkeys(map(group_of, side.names)):
        for name, tensor in side.load(group)[0].items():
            state[name].copy_(tensor)
