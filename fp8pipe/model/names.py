"""What names on disk mean: scales, experts, routers, and weights that vLLM serves unquantized. Fused ones: `fused`.

transformers does not know these facts; they come from the loaders of vLLM 0.32. Structure decides where it can, a leaf
name where it must, a model's name never. `oracle/transformers_probe.py` applies them to the modules that it finds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fp8pipe.model.architecture import Kind, TensorRole

# ---------------------------------------------------------------------------------------------- dtypes and scales

FP8 = "F8_E4M3"
"""The dtype of FP8 codes in a safetensors header."""

FLOATS = ("F32", "BF16", "F16")
"""Dtypes of weights that can be quantized, and of scales that become float32 without loss."""

UE8M0 = "ue8m0"
"""`scale_fmt` in quantization_config of scales that are powers of two: an exponent says it all."""

SCALE_NAMES = ("weight_scale_inv", "weight_scale")
"""Leaf names of an FP8 weight's scales, the more specific first. Both are multipliers."""

SPENT_NAMES = (*SCALE_NAMES, "input_scale", "activation_scale", "k_scale", "v_scale", "kv_scale")
"""Leaf names of all scales of an FP8 source; new ones replace them when it is quantized again."""


def kv_scale_holder(attention: str) -> str:
    """The module in whose name vLLM's loaders take the KV scales of the module `attention`.

    Its own, to which they append the `attn` that holds the cache in vLLM. They do not where the name ends in `attn`
    already (`transformer.h.0.attn`), so there it is written."""
    return f"{attention}.attn" if attention.endswith(".attn") else attention


# ---------------------------------------------------------------------------------------------- experts

EXPERT_KINDS: frozenset[Kind] = frozenset(("expert", "fused_experts"))
"""Kinds of tensors that hold experts which can be quantized."""

PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "gate_proj": ("gate_proj",),
    "down_proj": ("down_proj",),
}
"""A 3-D expert parameter of transformers -> the per-expert weights in it, as vLLM's loaders name them."""

_EXPERT = re.compile(r"^(.*\.experts)(?:\.\d+\..*|\.[^.]+)$")


def experts_holder(name: str, role: TensorRole) -> str:
    """The module below which vLLM's loaders look for `<expert>.<projection>`.

    `model.layers.0.mlp.experts` for tensors `model.layers.0.mlp.experts.3.up_proj.weight` and
    `...experts.gate_up_proj`. Granite MoE keeps `block_sparse_moe.input_linear.weight` beside the `experts` module that
    transformers and vLLM build from it."""
    if role.expert is not None:
        return re.sub(r"\.\d+\.[^.]+\.weight$", "", name)
    holder = name.removesuffix(".weight").rpartition(".")[0]
    is_beside = role.module.endswith(".experts") and not holder.endswith(".experts")
    return f"{holder}.experts" if is_beside else holder


def experts_holder_from_name(name: str) -> str | None:
    """The same for a checkpoint whose architecture is not known, from the name only; None if it is no expert's name."""
    match = _EXPERT.match(name.removesuffix(".weight"))
    return match[1] if match else None


# ---------------------------------------------------------------------------------------------- kept Linears

_ROUTER_LEAVES = frozenset(("gate", "gating"))


def is_router_leaf(leaf: str) -> bool:
    """Whether modules of this name decide which expert, or which part of a layer, runs: `gate`, `modality_router`."""
    return leaf in _ROUTER_LEAVES or "router" in leaf


ROUTER_REASON = "router: a flipped choice of expert costs more than its bytes"

UNQUANTIZED_LEAVES: Mapping[str, str] = {
    "weights_proj": "vLLM serves the sparse-attention indexer's head weights unquantized",
    "dt_proj": "vLLM serves the state-space time step unquantized",
    "x_proj": "vLLM serves the state-space input projection unquantized",
}

ABSORBED_LEAF = "kv_b_proj"
"""MLA's projection out of the latent, which vLLM absorbs into its neighbours. For compressed-tensors it runs an
identity through the Linear, and a static input scale below 1/448 would clip the ones."""


@dataclass(frozen=True, slots=True)
class Mixer:
    """A recurrent mixer: Mamba, a gated delta net, a short convolution."""

    decay: tuple[int, ...]
    """Shape of its `A_log` without ones: [channels, states] in the first Mamba, [heads] in others; empty without."""

    @property
    def is_first_mamba(self) -> bool:
        """Whether it is the first Mamba, which vLLM builds without a quantization config: `mamba_mixer.py`."""
        return len(self.decay) > 1

    def steers_state(self, out_features: int) -> bool:
        """Whether a Linear puts out no more than one or two numbers for each head, such as its decay."""
        return len(self.decay) == 1 and out_features <= 2 * self.decay[0]


def why_kept(leaf: str, out_features: int, *, mixer: Mixer | None) -> tuple[Kind, str] | None:
    """(kind, reason) for a Linear of the decoder layers that must stay unquantized; None for any other.

    `leaf`: its leaf name. `mixer`: the recurrent mixer that it is part of. Routers are found by
    `oracle/transformers_probe.py`, from the modules around them.
    """
    if out_features == 1:
        return "gate", "a gate with one output has nothing to gain"
    if leaf in UNQUANTIZED_LEAVES:
        return "mixer", UNQUANTIZED_LEAVES[leaf]
    if mixer is not None and mixer.is_first_mamba:
        return "mixer", "projection of a first Mamba, which vLLM serves unquantized"
    if mixer is not None and mixer.steers_state(out_features):
        return "mixer", "it steers a recurrent state by one or two numbers for each head, and their errors add up"
    return None
