"""What transformers cannot tell: which Linear-looking weights vLLM serves unquantized, and which it fuses.

Pure knowledge of the loaders (vLLM 0.32), by structure where structure tells and by leaf name where it does not;
never by model name. `probe.py` asks these rules for modules it has found by building the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

FUSED: tuple[frozenset[str], ...] = (
    frozenset(("q_proj", "k_proj", "v_proj")),
    frozenset(("query", "key", "value")),
    frozenset(("wq", "wk", "wv")),
    frozenset(("gate_proj", "up_proj")),
    frozenset(("w1", "w3")),
    frozenset(("c_fc_0", "c_fc_1")),
    frozenset(("q_a_proj", "kv_a_proj_with_mqa")),
    frozenset(("in_proj_qkv", "in_proj_z")),
)
"""Leaf names of sibling Linears that vLLM's `packed_modules_mapping`s make one matrix, over all its models."""

ROUTER_LEAVES = frozenset(("router", "gate", "gating"))
"""Last name of a module that decides which expert runs."""

MIXER_LEAVES = frozenset(("in_proj", "out_proj", "in_proj_qkv", "in_proj_z", "in_proj_qkvz"))
"""Linears of a recurrent mixer (Mamba, gated delta net) that vLLM builds with a quantization config."""

UNQUANTIZED_LEAVES: Mapping[str, str] = {
    "weights_proj": "vLLM serves the sparse-attention indexer's head weights unquantized",
    "dt_proj": "vLLM serves the state-space time step unquantized",
    "x_proj": "vLLM serves the state-space input projection unquantized",
}

PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "gate_proj": ("gate_proj",),
    "down_proj": ("down_proj",),
}
"""A 3-D expert parameter of transformers -> the per-expert weights in it, as vLLM's loaders name them."""


def why_kept(
    leaf: str, class_name: str, out_features: int, *, in_mixer: bool, num_experts: int | None
) -> tuple[str, str] | None:
    """(kind, reason) for a Linear of the decoder layers that must stay in the source's dtype, None for one that need
    not.

    `leaf`: its last name. `in_mixer`: it stands beside a convolution. `num_experts`: experts beside it, None without.
    """
    if leaf in ROUTER_LEAVES or "Router" in class_name or (num_experts is not None and out_features == num_experts):
        return "router", "router: a flipped choice of expert costs more than its bytes"
    if out_features == 1:
        return "gate", "a gate with one output has nothing to gain"
    if leaf in UNQUANTIZED_LEAVES:
        return "mixer", UNQUANTIZED_LEAVES[leaf]
    if in_mixer and leaf not in MIXER_LEAVES:
        return "mixer", "small projection of a recurrent mixer, sensitive and not aligned to FP8 tiles"
    return None


def fused_groups(modules: Iterable[str]) -> dict[str, str]:
    """Module name on disk -> name of its fused group, for siblings that vLLM makes one matrix."""
    by_parent: dict[str, list[str]] = {}
    for name in modules:
        by_parent.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    groups: dict[str, str] = {}
    for parent, leaves in by_parent.items():
        for fused in FUSED:
            members = [leaf for leaf in leaves if leaf in fused]
            if len(members) > 1:
                groups |= {f"{parent}.{leaf}": f"{parent}.({'+'.join(members)})" for leaf in members}
    return groups
