"""What names on disk say about fused Linears and experts."""

from __future__ import annotations

import pytest

from fp8pipe.model.architecture import TensorRole
from fp8pipe.model.fused import fused_groups, fused_siblings
from fp8pipe.model.names import experts_holder, experts_holder_from_name

LAYER = "model.layers.0"


def test_siblings_that_vllm_fuses_come_in_its_order() -> None:
    leaves = ("self_attn.v_proj", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj")
    assert list(fused_siblings((f"{LAYER}.{leaf}" for leaf in leaves), ())) == [
        (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"),
        (f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.v_proj"),
    ]


def test_a_group_is_named_after_its_members_and_a_single_linear_has_none() -> None:
    groups = fused_groups([f"{LAYER}.mlp.{leaf}_proj" for leaf in ("up", "gate", "down")], ())
    name = f"{LAYER}.mlp.(gate_proj+up_proj)"
    assert groups == {f"{LAYER}.mlp.gate_proj": name, f"{LAYER}.mlp.up_proj": name}


def test_linears_of_different_parents_are_not_fused() -> None:
    assert fused_groups(["a.q_proj", "b.k_proj"], ()) == {}


@pytest.mark.parametrize(
    ("leaves", "fused"),
    [
        ("q k v g a b o", "q k v g"),
        ("q k v b f_a f_b g_a g_b o", "q k v b f_a g_a"),
        ("q k v b f_a g o", "q k v g f_a b"),
    ],
)
def test_what_vllm_fuses_in_a_recurrent_mixer_is_fused_with_more_than_in_attention(leaves: str, fused: str) -> None:
    modules = [f"{LAYER}.self_attn.{leaf}_proj" for leaf in leaves.split()]
    mixer, attention = (
        [[name.split(".")[-1].removesuffix("_proj") for name in members] for members in fused_siblings(modules, others)]
        for others in ([f"{LAYER}.self_attn.q_conv1d.weight"], [])
    )
    assert mixer == [fused.split()]
    assert attention == [["q", "k", "v"]]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        (f"{LAYER}.mlp.experts.3.up_proj.weight", TensorRole(kind="expert", expert=3)),
        (f"{LAYER}.mlp.experts.gate_up_proj", TensorRole(kind="fused_experts", module=f"{LAYER}.mlp.experts")),
        (f"{LAYER}.mlp.input_linear.weight", TensorRole(kind="fused_experts", module=f"{LAYER}.mlp.experts")),
    ],
)
def test_all_experts_of_a_layer_have_one_holder(name: str, role: TensorRole) -> None:
    assert experts_holder(name, role) == f"{LAYER}.mlp.experts"


@pytest.mark.parametrize(
    ("name", "holder"),
    [
        (f"{LAYER}.mlp.experts.3.up_proj.weight", f"{LAYER}.mlp.experts"),
        (f"{LAYER}.mlp.experts.3.up_proj.weight_scale", f"{LAYER}.mlp.experts"),
        (f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts"),
        (f"{LAYER}.mlp.up_proj.weight", None),
    ],
)
def test_the_holder_of_an_expert_is_known_from_its_name(name: str, holder: str | None) -> None:
    assert experts_holder_from_name(name) == holder
