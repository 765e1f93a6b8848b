"""What the probe finds in real architectures, made tiny; and that its answers are kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.malformed import drop
from support.tiny_models import architecture_of, plan_of, recipe

from fp8pipe.errors import MalformedCheckpoint, UnsupportedArchitecture
from fp8pipe.hub.source import resolve
from fp8pipe.model import names as rules
from fp8pipe.model.architecture import QUANTIZABLE, Architecture
from fp8pipe.oracle import transformers
from fp8pipe.oracle.transformers import inspect

Models = Callable[..., Path]


def kinds(found: Architecture) -> dict[str, set[str]]:
    """Kind -> names on disk, layers and experts as N."""
    table: dict[str, set[str]] = {}
    for name, role in found.tensors.items():
        table.setdefault(role.kind, set()).add(re.sub(r"\.\d+\.", ".N.", name))
    return table


ATTENTION = {f"model.layers.N.self_attn.{leaf}_proj.weight" for leaf in "qkvo"}
MLP = {f"model.layers.N.mlp.{leaf}_proj.weight" for leaf in ("gate", "up", "down")}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3-text"])
def test_dense_decoders_quantize_exactly_the_linears_of_their_layers(model_folder: Models, name: str) -> None:
    found = kinds(architecture_of(model_folder(name)))
    assert found["linear"] == ATTENTION | MLP
    assert found["embedding"] == {"model.embed_tokens.weight"}
    assert set(found) <= {"linear", "embedding", "lm_head", "norm", "bias"}


def test_every_tensor_has_a_role_and_every_kept_one_a_reason(model_folder: Models) -> None:
    for name in ("llama", "qwen3-moe", "mixtral", "deepseek-v2", "gpt-oss", "opt", "phi3"):
        found = architecture_of(model_folder(name))
        for tensor, role in found.tensors.items():
            assert (role.kind in QUANTIZABLE) == (role.reason == ""), tensor


def test_names_are_those_on_disk_and_lead_to_transformers_modules(model_folder: Models) -> None:
    found = architecture_of(model_folder("mixtral"))
    role = found.tensors["model.layers.0.block_sparse_moe.experts.3.w1.weight"]
    assert (role.kind, role.module, role.parameter, role.expert) == (
        "expert",
        "model.layers.0.mlp.experts",
        "gate_up_proj",
        3,
    )
    assert found.tensors["model.layers.1.block_sparse_moe.gate.weight"].kind == "router"
    assert found.tensors["model.layers.0.self_attn.q_proj.weight"].module == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "deepseek-v2"])
def test_routers_are_kept_and_every_expert_is_found(model_folder: Models, name: str) -> None:
    found = architecture_of(model_folder(name))
    table = kinds(found)
    assert len(table["router"]) == 1
    assert len(table["expert"]) == 3
    experts = [role for role in found.tensors.values() if role.kind == "expert"]
    assert {role.expert for role in experts} == {0, 1, 2, 3}


def test_an_expert_s_index_is_its_place_in_the_module_that_it_is_loaded_into(model_folder: Models) -> None:
    """Ernie 4.5 VL numbers the experts for text and those for images in one row, and transformers deals them out."""
    found = architecture_of(model_folder("ernie-vl-moe"))
    places = {
        int(name.split(".")[-3]): (role.module.split(".")[-2], role.expert)
        for name, role in found.tensors.items()
        if role.kind == "expert"
    }
    kinds_of_experts = ("text_moe", "vision_moe")
    assert places == {
        4 * part + index: (kind, index) for part, kind in enumerate(kinds_of_experts) for index in range(4)
    }
    assert found.experts == {"model.layers.1.mlp.experts": 8}
    assert found.misfits == ()


@pytest.mark.parametrize("name", ["qwen3-moe", "ernie-vl-moe"])
def test_an_expert_that_the_files_lack_is_a_misfit(model_folder: Models, tmp_path: Path, name: str) -> None:
    lost = [tensor for tensor in architecture_of(model_folder(name)).tensors if ".experts.1." in tensor]
    saved = shutil.copytree(model_folder(name), tmp_path / "model")
    drop(saved, *lost)
    with pytest.raises(MalformedCheckpoint, match=r"experts\..*: 3 experts on disk, 4 in the model"):
        plan_of(saved, recipe("fp8-dynamic"))


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("hunyuan-moe", "model.layers.N.mlp.gate.wg.weight"),
        ("gemma4-moe", "model.layers.N.router.proj.weight"),
        ("qwen3-vl-moe", "model.language_model.layers.N.mlp.gate.weight"),
        ("step3p7", "model.layers.N.moe.gate.weight"),
    ],
)
def test_a_router_is_found_wherever_it_is_and_whatever_it_is_called(
    model_folder: Models, name: str, router: str
) -> None:
    assert kinds(architecture_of(model_folder(name)))["router"] == {router}


def layouts(folder: Path) -> dict[str, tuple[bool, tuple[str, ...]]]:
    """Tensor of experts -> whether its matrices are transposed on disk, and which projections it holds."""
    roles = architecture_of(folder).tensors.items()
    return {name: (role.layout.transposed, role.layout.projections) for name, role in roles if role.layout is not None}


def test_experts_that_transformers_does_not_transpose_are_not_transposed(model_folder: Models) -> None:
    assert set(layouts(model_folder("qwen3-vl-moe")).values()) == {
        (False, ("gate_proj", "up_proj")),
        (False, ("down_proj",)),
    }


def test_experts_that_transformers_transposes_are_transposed(model_folder: Models, tmp_path: Path) -> None:
    """Early checkpoints of this architecture hold [in, out]; the converter sees it by the shape."""
    saved = shutil.copytree(model_folder("qwen3-vl-moe"), tmp_path / "model")
    for shard in saved.glob("*.safetensors"):
        tensors = load_file(shard)
        turned = {name: t.transpose(1, 2).contiguous() for name, t in tensors.items() if name.endswith("gate_up_proj")}
        save_file(tensors | turned, shard, metadata={"format": "pt"})
    found = {held: transposed for transposed, held in layouts(saved).values()}
    assert found == {("gate_proj", "up_proj"): True, ("down_proj",): False}


def test_gate_and_up_that_are_stored_apart_are_one_projection_each(model_folder: Models) -> None:
    assert layouts(model_folder("step3p7")) == {
        "model.layers.1.moe.gate_proj.weight": (False, ("gate_proj",)),
        "model.layers.1.moe.up_proj.weight": (False, ("up_proj",)),
        "model.layers.1.moe.down_proj.weight": (False, ("down_proj",)),
    }


def test_linears_of_recurrent_mixers_are_quantized_with_what_vllm_fuses_them_with(model_folder: Models) -> None:
    def mixer(name: str, module: str) -> dict[str, str]:
        roles = architecture_of(model_folder(name)).tensors
        held = {tensor.split(".")[-2]: role for tensor, role in roles.items() if tensor.startswith(module)}
        return {leaf: role.group.rpartition(".")[2] or role.kind for leaf, role in held.items() if "_proj" in leaf}

    four = "(q_proj+k_proj+v_proj+g_proj)"
    alone = {"o_proj": "linear", "a_proj": "mixer", "b_proj": "mixer"}  # of a and b one number for each head
    assert mixer("olmo-hybrid", "model.layers.0.linear_attn") == alone | {f"{leaf}_proj": four for leaf in "qkvg"}
    six = "(q_proj+k_proj+v_proj+b_proj+f_a_proj+g_a_proj)"
    alone = {"o_proj": "linear", "f_b_proj": "linear", "g_b_proj": "linear"}
    fused = {f"{leaf}_proj": six for leaf in ("q", "k", "v", "b", "f_a", "g_a")}
    assert mixer("kimi-linear", "model.layers.0.self_attn") == alone | fused


@pytest.mark.parametrize(
    ("name", "layers"), [("longcat", "model.layers"), ("git", "git.encoder.layer"), ("llama", "model.layers")]
)
def test_the_decoders_layers_are_those_of_the_model_whatever_the_config_counts(
    model_folder: Models, name: str, layers: str
) -> None:
    """LongCat counts two layers for each of its own; GIT has as many layers in its vision tower."""
    found = architecture_of(model_folder(name))
    assert (found.layers_module, found.num_layers, found.misfits) == (layers, 2, ())
    linears = {tensor for tensor, role in found.tensors.items() if role.kind in QUANTIZABLE}
    assert linears and all(tensor.startswith(f"{layers}.") for tensor in linears)


def test_a_model_whose_layers_are_in_two_lists_is_refused(model_folder: Models) -> None:
    from fp8pipe.oracle import transformers_probe as probe

    with pytest.raises(probe.Unsupported, match=r"L_module\.layers, H_module\.layers"):
        probe.examine(model_folder("hrm"), {}, False)


def test_only_what_keeps_keys_and_values_is_attention(model_folder: Models) -> None:
    lfm2 = architecture_of(model_folder("lfm2"))  # its convolutions keep their state in the same cache
    assert [layer.name for layer in lfm2.attention] == [f"model.layers.{i}.self_attn" for i in (1, 3)]


def test_layers_of_one_model_may_have_other_heads(model_folder: Models) -> None:
    found = architecture_of(model_folder("gemma4-moe")).attention
    assert [(layer.num_kv_heads, layer.head_dim) for layer in found] == [(2, 16), (2, 32)]


def test_a_layer_that_reads_anothers_keys_and_values_names_it(model_folder: Models) -> None:
    """Sliding layers read the last sliding one, full layers the last full one."""
    found = architecture_of(model_folder("gemma4-shared")).attention
    own = [f"model.layers.{i}.self_attn" for i in range(4)]
    assert [(layer.name, layer.lender) for layer in found] == list(zip(own, ["", "", own[0], own[1]], strict=True))


def test_fused_groups_are_siblings_that_share_their_input(model_folder: Models) -> None:
    def groups(name: str) -> set[frozenset[str]]:
        members: dict[str, set[str]] = {}
        for tensor, role in architecture_of(model_folder(name)).tensors.items():
            if role.group:
                members.setdefault(role.group, set()).add(tensor.removesuffix(".weight").rpartition(".")[2])
        return {frozenset(leaves) for leaves in members.values()}

    qkv, gate_up = frozenset(("q_proj", "k_proj", "v_proj")), frozenset(("gate_proj", "up_proj"))
    assert groups("llama") == {qkv, gate_up}
    assert groups("mixtral") == {qkv, frozenset(("w1", "w3"))}
    assert groups("deepseek-v2") == {gate_up, frozenset(("q_a_proj", "kv_a_proj_with_mqa"))}
    assert groups("phi3") == set()


def test_attention_layers_with_their_heads(model_folder: Models) -> None:
    llama = architecture_of(model_folder("llama"))
    assert [(layer.name, layer.num_kv_heads, layer.head_dim, layer.mla) for layer in llama.attention] == [
        ("model.layers.0.self_attn", 2, 16, False),
        ("model.layers.1.self_attn", 2, 16, False),
    ]
    assert (llama.num_layers, llama.layers_module) == (2, "model.layers")
    opt = architecture_of(model_folder("opt"))
    assert [layer.name for layer in opt.attention] == [f"model.decoder.layers.{i}.self_attn" for i in (0, 1)]
    assert all(layer.mla for layer in architecture_of(model_folder("deepseek-v2")).attention)
    neox = architecture_of(model_folder("gpt-neox"))  # calls its cache layer_past
    assert [layer.name for layer in neox.attention] == [f"gpt_neox.layers.{i}.attention" for i in (0, 1)]


def test_tied_embeddings_are_known(model_folder: Models) -> None:
    assert architecture_of(model_folder("llama-tied")).tied_embeddings
    assert not architecture_of(model_folder("llama")).tied_embeddings


def test_fused_projections_on_disk_know_where_vllm_cuts_them(model_folder: Models) -> None:
    tensors = architecture_of(model_folder("phi3")).tensors
    assert tensors["model.layers.0.self_attn.qkv_proj.weight"].parts == (64, 32, 32)
    assert tensors["model.layers.0.mlp.gate_up_proj.weight"].parts == (160, 160)
    assert tensors["model.layers.0.mlp.down_proj.weight"].parts == ()


def test_gate_and_up_of_granites_shared_expert_are_cut_as_well(tmp_path: Path) -> None:
    from support.tiny_models import SIZES
    from transformers import GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM

    config = GraniteMoeSharedConfig(**SIZES, shared_intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)
    GraniteMoeSharedForCausalLM(config).save_pretrained(tmp_path)
    tensors = architecture_of(tmp_path).tensors
    assert tensors["model.layers.0.shared_mlp.input_linear.weight"].parts == (96, 96)
    assert tensors["model.layers.0.block_sparse_moe.input_linear.weight"].kind == "fused_experts"


def test_vision_tower_projector_and_convolutions_are_kept(tmp_path: Path) -> None:
    from support.tiny_models import SIZES
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=vision, image_token_index=90)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    found = architecture_of(tmp_path)
    outside = {name for name in found.tensors if "vision_tower" in name or "multi_modal_projector" in name}
    assert sum(name.endswith(".weight") and "proj" in name for name in outside) > 4
    assert not any(found.tensors[name].kind in QUANTIZABLE for name in outside)
    assert {found.tensors[name].kind for name in outside if name.endswith("patch_embedding.weight")} == {"conv"}
    linears = {name for name, role in found.tensors.items() if role.kind == "linear"}
    assert len(linears) == 2 * 7 and all("layers." in name and "vision" not in name for name in linears)
    assert [role.kind for name, role in found.tensors.items() if name.endswith("lm_head.weight")] == ["lm_head"]


def test_experts_with_biases_are_kept(model_folder: Models) -> None:
    table = kinds(architecture_of(model_folder("gpt-oss")))
    assert table["kept_experts"] == {f"model.layers.N.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")}
    assert table["linear"] == ATTENTION
    assert table["router"] == {"model.layers.N.mlp.router.weight"}


def test_a_tensor_that_transformers_does_not_know_is_kept(model_folder: Models, tmp_path: Path) -> None:
    from fp8pipe.oracle import transformers_probe as probe

    shapes = {"model.layers.0.self_attn.q_proj.weight": [64, 64], "model.layers.2.self_attn.q_proj.weight": [64, 64]}
    answer = probe.examine(model_folder("llama"), shapes, False)
    assert answer["tensors"]["model.layers.0.self_attn.q_proj.weight"]["kind"] == "linear"
    assert answer["tensors"]["model.layers.2.self_attn.q_proj.weight"]["kind"] == "unused"


@pytest.mark.parametrize(
    ("leaf", "out_features", "mixer", "kind"),
    [
        ("q_proj", 64, None, None),
        ("shared_expert_gate", 1, None, "gate"),
        ("weights_proj", 64, None, "mixer"),
        ("in_proj", 64, rules.Mixer(()), None),  # a short convolution
        ("in_proj", 64, rules.Mixer((32, 16)), "mixer"),  # the first Mamba
        ("o_proj", 64, rules.Mixer((16,)), None),
        ("in_proj_ba", 32, rules.Mixer((16,)), "mixer"),
    ],
)
def test_rules_for_linears_that_stay_unquantized(
    leaf: str, out_features: int, mixer: rules.Mixer | None, kind: str | None
) -> None:
    found = rules.why_kept(leaf, out_features, mixer=mixer)
    assert (found[0] if found else None) == kind


def test_what_puts_out_a_number_for_each_expert_is_a_router_without_a_name_for_it(model_folder: Models) -> None:
    from fp8pipe.oracle import transformers_probe as probe

    model, _ = probe.build(model_folder("granitemoe"), False)
    moe = model.get_submodule("model.layers.0.block_sparse_moe")
    moe.chooser = moe.router
    del moe.router
    survey = probe.Survey(model, {}, {})
    assert survey.is_in_router("model.layers.0.block_sparse_moe.chooser.layer")
    assert not survey.is_in_router("model.layers.0.self_attn.k_proj")
    assert not survey.is_in_router("model.layers.0.block_sparse_moe.experts")


# ---------------------------------------------------------------------------------------------- the child, its record


def test_the_child_answers_once_and_its_record_serves_after_that(
    model_folder: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path))
    folder = model_folder("llama")
    first = inspect(resolve(str(folder)))
    assert first == architecture_of(folder)
    (record,) = (tmp_path / "architectures").glob("*.json")
    record.write_text(first.model_copy(update={"model_type": "from the record"}).model_dump_json())
    assert inspect(resolve(str(folder))).model_type == "from the record"
    monkeypatch.setattr(transformers, "PROBE_VERSION", 0)
    assert inspect(resolve(str(folder))).model_type == "llama"


def test_what_cannot_be_quantized_is_refused_with_the_reason(
    model_folder: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UnsupportedArchitecture, match="Conv1D"):
        inspect(resolve(str(model_folder("gpt2"))))
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    for file in model_folder("llama").glob("model*"):
        (unknown / file.name).write_bytes(file.read_bytes())
    (unknown / "config.json").write_text(json.dumps({"model_type": "nobody-knows", "architectures": ["Nobody"]}))
    with pytest.raises(UnsupportedArchitecture, match="nobody-knows"):
        inspect(resolve(str(unknown)))
