"""Which Linears vLLM fuses into one matrix, by their names on disk. They share one precision, and often one scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

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
`packed_modules_mapping`s. Not listed: in_proj_ba, qkvb_proj, fc13 and merged_proj."""

FUSED_BESIDE_CONVOLUTIONS: Mapping[str, tuple[str, ...]] = {
    "in_proj_qkvgfab": ("q_proj", "k_proj", "v_proj", "g_proj", "f_a_proj", "b_proj"),
    "in_proj_qkvbfg_a": ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj"),
    "in_proj_qkvg": ("q_proj", "k_proj", "v_proj", "g_proj"),
}
"""The same for a recurrent mixer, in which q, k and v each go through a convolution: vLLM's name of the matrix, and its
members; the first that are all there count. From vllm/models/{kimi_k3,glm5next} and vllm/model_executor/layers/mamba/
gdn. Kimi Linear has the names of the second; that its g_a_proj is by itself in vLLM does no harm. In attention g_proj
and b_proj are by themselves."""

_CONVOLUTION = ".q_conv1d."

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


def fused_siblings(modules: Iterable[str], tensors: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Names of sibling modules that vLLM fuses into one matrix: one tuple for each matrix, in vLLM's order.

    tensors: names of all tensors on disk, which tell a recurrent mixer from attention."""
    mixers = {name.partition(_CONVOLUTION)[0] for name in tensors if _CONVOLUTION in name}
    leaves_of: dict[str, set[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        leaves_of.setdefault(parent, set()).add(leaf)
    for parent, leaves in sorted(leaves_of.items()):
        for members in _fused_among(leaves, in_mixer=parent in mixers):
            yield tuple(f"{parent}.{leaf}" for leaf in members)


def _fused_among(leaves: set[str], *, in_mixer: bool) -> Iterator[Sequence[str]]:
    """The leaf names of siblings, those together that vLLM fuses."""
    whole = filter(leaves.issuperset, FUSED_BESIDE_CONVOLUTIONS.values())
    if in_mixer and (first := next(whole, None)):
        yield first
        leaves = leaves.difference(first)
    for fused in FUSED:
        members = [leaf for leaf in fused if leaf in leaves]
        if len(members) > 1:
            yield members


def fused_groups(modules: Iterable[str], tensors: Iterable[str]) -> dict[str, str]:
    """Module name -> name of its fused group, `model.layers.0.self_attn.(q_proj+k_proj+v_proj)`."""
    groups: dict[str, str] = {}
    for members in fused_siblings(modules, tensors):
        parent = members[0].rpartition(".")[0]
        leaves = "+".join(member.rpartition(".")[2] for member in members)
        groups |= dict.fromkeys(members, f"{parent}.({leaves})")
    return groups


def mixers_matrix(group: str) -> Iterator[str]:
    """vLLM's name of the matrix that a group of a recurrent mixer becomes; none for other groups. Not every model of
    vLLM knows which names on disk it stands for."""
    parent, _, leaves = group.removesuffix(")").rpartition(".(")
    members = tuple(leaves.split("+"))
    yield from (f"{parent}.{name}" for name, fused in FUSED_BESIDE_CONVOLUTIONS.items() if fused == members)
