"""What transformers cannot tell: which Linear-looking weights vLLM serves unquantized, and which it fuses.

Pure knowledge of the loaders (vLLM 0.32), by structure where structure tells and by leaf name where it does not;
never by model name. `probe.py` asks these rules for modules it has found by building the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
)
"""Leaf names of sibling Linears that vLLM's `packed_modules_mapping`s make one matrix, in vLLM's order, over all its
models."""

FUSED_QKV = frozenset(("qkv_proj", "query_key_value", "Wqkv", "wqkv", "qkv"))
FUSED_GATE_UP = frozenset(("gate_up_proj", "dense_h_to_4h", "input_linear"))
"""Leaf names of Linears that are one tensor on disk and several shards in vLLM."""

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
    leaf: str, class_name: str, out_features: int, *, mixer: Collection[str], num_experts: int | None
) -> tuple[str, str] | None:
    """(kind, reason) for a Linear of the decoder layers that must stay in the source's dtype, None for one that need
    not.

    `leaf`: its last name. `mixer`: names beside it if a convolution is among them, else empty. `num_experts`: experts
    beside it, None without.
    """
    if leaf in ROUTER_LEAVES or "Router" in class_name or (num_experts is not None and out_features == num_experts):
        return "router", "router: a flipped choice of expert costs more than its bytes"
    if out_features == 1:
        return "gate", "a gate with one output has nothing to gain"
    if leaf in UNQUANTIZED_LEAVES:
        return "mixer", UNQUANTIZED_LEAVES[leaf]
    if mixer and (leaf not in MIXER_LEAVES or {"x_proj", "dt_proj"} & set(mixer)):
        return "mixer", "projection of a recurrent mixer that vLLM serves unquantized"
    return None


def fused_groups(modules: Iterable[str]) -> dict[str, str]:
    """Module name on disk -> name of its fused group, for siblings that vLLM makes one matrix."""
    by_parent: dict[str, list[str]] = {}
    for name in modules:
        by_parent.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    groups: dict[str, str] = {}
    for parent, leaves in by_parent.items():
        for fused in FUSED:
            members = [leaf for leaf in fused if leaf in leaves]
            if len(members) > 1:
                groups |= {f"{parent}.{leaf}": f"{parent}.({'+'.join(members)})" for leaf in members}
    return groups
