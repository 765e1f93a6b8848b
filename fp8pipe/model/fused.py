"""Which Linears vLLM fuses into one matrix, by their names on disk. They share one precision, and often one scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

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
"""Leaf names of sibling Linears that vLLM fuses into one matrix, in its order, from its models'
`packed_modules_mapping`s. Not listed: in_proj_ba, in_proj_qkvg, qkvb_proj, fc13 and merged_proj."""

FUSED_QKV = frozenset(("qkv_proj", "query_key_value", "Wqkv", "wqkv", "qkv"))
FUSED_GATE_UP = frozenset(("gate_up_proj", "dense_h_to_4h", "input_linear"))
"""Leaf names of Linears that are one tensor on disk and several shards in vLLM."""

FUSED_NAMES: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj", "query", "key", "value", "wq", "wk", "wv", "qkv"),
    "qkv": ("q_proj", "k_proj", "v_proj", "query", "key", "value"),
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3", "c_fc_0", "c_fc_1"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Leaf names that vLLM gives fused matrices, which an ignore list may hold instead of their members' names."""


def fused_names(module: str) -> Iterator[str]:
    """Names that vLLM may give the matrix into which it fuses `module`."""
    parent, _, leaf = module.rpartition(".")
    yield from (f"{parent}.{fused}" for fused, members in FUSED_NAMES.items() if leaf in members)


def fused_siblings(modules: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Names of sibling modules that vLLM fuses into one matrix: one tuple for each matrix, in vLLM's order."""
    leaves_of: dict[str, set[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        leaves_of.setdefault(parent, set()).add(leaf)
    for parent, leaves in sorted(leaves_of.items()):
        for fused in FUSED:
            members = tuple(f"{parent}.{leaf}" for leaf in fused if leaf in leaves)
            if len(members) > 1:
                yield members


def fused_groups(modules: Iterable[str]) -> dict[str, str]:
    """Module name -> name of its fused group, `model.layers.0.self_attn.(q_proj+k_proj+v_proj)`."""
    groups: dict[str, str] = {}
    for members in fused_siblings(modules):
        parent = members[0].rpartition(".")[0]
        leaves = "+".join(member.rpartition(".")[2] for member in members)
        groups |= dict.fromkeys(members, f"{parent}.({leaves})")
    return groups
