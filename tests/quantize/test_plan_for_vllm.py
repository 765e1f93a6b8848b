"""The plan quantizes what vLLM can serve, keeps the rest with the reason, and names both as vLLM reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.quantizing import Models, edit_tensors, kept, make
from support.tiny_models import architecture_of, plan_of, recipe
from torch import Tensor

from fp8pipe.errors import ConfigError, UnsupportedArchitecture
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.architecture import ExpertLayout, TensorRole
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import make_plan
from fp8pipe.validate import validate


def test_routers_are_kept_and_named_in_both_spellings(model_folder: Models) -> None:
    channel = plan_of(model_folder("mixtral"), recipe())
    assert "model.layers.1.block_sparse_moe.gate" in channel.quantization_config["ignore"]
    fp8 = plan_of(model_folder("mixtral"), recipe("autofp8-dynamic"))
    assert "model.layers.1.block_sparse_moe.gate" in fp8.quantization_config["ignored_layers"]
    assert not any(entry.startswith("re:") for entry in fp8.quantization_config["ignored_layers"])


def test_experts_need_a_scheme_that_vllm_has_a_kernel_for(model_folder: Models) -> None:
    per_tensor = {"weights": {"strategy": "tensor"}, "activations": {"mode": "dynamic", "strategy": "token"}}
    with pytest.raises(ConfigError, match="experts"):
        plan_of(model_folder("qwen3-moe"), recipe(**per_tensor))
    with pytest.raises(ConfigError, match="experts"):
        plan_of(model_folder("qwen3-moe"), recipe(activations=None))
    plan_of(model_folder("llama"), recipe(**per_tensor))
    plan_of(model_folder("qwen3-moe"), recipe("autofp8-dynamic"))


def test_blocks_keep_what_vllm_cannot_cut(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama"), recipe("fp8-block"))
    names = {tensor.name.split(".")[-2] for tensor in plan.tensors if tensor.action == "quantize"}
    assert names == {"o_proj", "down_proj"}  # which are not fused with others
    assert any("do not begin at blocks" in reason for reason in kept(plan).values())
    wide = model_folder("llama", head_dim=64, intermediate_size=256)
    fits = plan_of(wide, recipe("fp8-block"))
    names = {tensor.name.split(".")[-2] for tensor in fits.tensors if tensor.action == "quantize"}
    assert names == {f"{leaf}_proj" for leaf in ("q", "k", "v", "o", "gate", "up", "down")}


def test_the_last_shard_of_a_fused_matrix_may_end_inside_a_block(model_folder: Models) -> None:
    folder = model_folder("deepseek-v2", q_lora_rank=128)  # q_a_proj 128 rows, kv_a_proj_with_mqa 48, last
    plan = plan_of(folder, recipe("fp8-block"))
    quantized = {tensor.name.split(".")[-2] for tensor in plan.tensors if tensor.action == "quantize"}
    assert {"q_a_proj", "kv_a_proj_with_mqa"} <= quantized


def test_a_fused_tensor_whose_shards_do_not_fit_blocks_is_kept(model_folder: Models) -> None:
    plan = plan_of(model_folder("phi3"), recipe("fp8-block"))
    assert {"model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"} <= set(kept(plan))


def test_static_activations_keep_the_absorbed_mla_projection(model_folder: Models) -> None:
    static = plan_of(model_folder("deepseek-v2"), recipe("fp8-static"))
    assert "identity" in kept(static)["model.layers.0.self_attn.kv_b_proj.weight"]
    dynamic = plan_of(model_folder("deepseek-v2"), recipe())
    assert "model.layers.0.self_attn.kv_b_proj.weight" not in kept(dynamic)


def test_a_recipe_that_quantizes_nothing_is_refused(model_folder: Models) -> None:
    with pytest.raises(UnsupportedArchitecture, match="none of its tensors"):
        plan_of(model_folder("llama"), recipe(ignore=["re:.*"]))


# ---------------------------------------------------------------------------------------------- KV cache, 3-D experts


def test_kv_scales_are_in_the_shard_of_their_attention(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama"), recipe("fp8-static-kv"))
    scales = {output.name: output for output in plan.outputs if output.role in {"k_scale", "v_scale"}}
    assert set(scales) == {f"model.layers.{i}.self_attn.{leaf}_scale" for i in (0, 1) for leaf in "kv"}
    shard_of = {output.name: output.shard for output in plan.outputs}
    shards = {shard_of[f"model.layers.0.self_attn.{leaf}_proj.weight"] for leaf in "qkvo"}
    assert scales["model.layers.0.self_attn.k_scale"].shard in shards
    assert scales["model.layers.0.self_attn.k_scale"].shape == (1,)


def test_kv_scales_of_an_attention_called_attn_are_where_vllm_looks_for_them(
    model_folder: Models, tmp_path: Path
) -> None:
    source = model_folder("gptj")
    plan, _ = make(source, recipe("fp8-static-kv"), tmp_path)
    names = {output.name for output in plan.outputs if output.role == "k_scale"}
    assert names == {f"transformer.h.{layer}.attn.attn.k_scale" for layer in (0, 1)}
    assert plan.calibrated_attention() == tuple(f"transformer.h.{layer}.attn" for layer in (0, 1))
    report = validate(tmp_path, source=resolve(str(source)), architecture=architecture_of(source), depth="headers")
    assert not [finding.sentence() for finding in report.findings]


def test_kv_scales_per_head_have_one_entry_per_kv_head(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama"), recipe("fp8-static-kv", kv_cache={"strategy": "head"}))
    shapes = {output.shape for output in plan.outputs if output.role == "k_scale"}
    assert shapes == {(2, 1, 1)}
    assert plan.quantization_config["kv_cache_scheme"]["strategy"] == "attn_head"


def test_latent_attention_gets_no_kv_scales_and_a_note(model_folder: Models) -> None:
    plan = plan_of(model_folder("deepseek-v2"), recipe("fp8-static-kv"))
    assert not plan.calibrated_attention()
    assert plan.quantization_config["kv_cache_scheme"] is None
    assert "MLA" in plan.notes[0]


def test_experts_in_one_tensor_are_split_into_what_vllm_loads(tmp_path: Path, model_folder: Models) -> None:
    folder = tmp_path / "fused"
    shutil.copytree(model_folder("qwen3-moe", shard_size="1GB"), folder)

    def fuse(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "experts" in name]:
            del tensors[name]
        for layer in (0, 1):
            experts = f"model.layers.{layer}.mlp.experts"
            tensors[f"{experts}.gate_up_proj"] = torch.zeros(4, 64, 64, dtype=torch.bfloat16)
            tensors[f"{experts}.down_proj"] = torch.zeros(4, 64, 32, dtype=torch.bfloat16)

    edit_tensors(folder, fuse)
    plan = plan_of(folder, recipe())
    made = {output.name: output.shape for output in plan.outputs if ".experts." in output.name}
    whole = plan_of(model_folder("qwen3-moe"), recipe())
    assert made == {output.name: output.shape for output in whole.outputs if ".experts." in output.name}


def test_experts_stored_beside_their_module_get_its_name(model_folder: Models) -> None:
    plan = plan_of(model_folder("granitemoe"), recipe())
    made = {output.name for output in plan.outputs if output.role == "weight" and output.slice is not None}
    assert made == {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}_proj.weight"
        for layer in (0, 1)
        for expert in range(4)
        for leaf in ("gate", "up", "down")
    }
    spared = plan_of(model_folder("granitemoe"), recipe(ignore=["re:.*block_sparse_moe"]))
    assert r"re:.*layers\.0\.block_sparse_moe\.experts\..*" in spared.quantization_config["ignore"]


def test_the_plan_of_transposed_and_interleaved_experts_names_their_rows(model_folder: Models) -> None:
    snapshot = resolve(str(model_folder("gpt-oss")))
    found = architecture_of(model_folder("gpt-oss"))
    layout = ExpertLayout(transposed=True, interleaved=True, projections=("gate_proj", "up_proj"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    role = TensorRole(kind="fused_experts", parameter="gate_up_proj", layout=layout)
    changed = found.model_copy(update={"tensors": found.tensors | {name: role}})
    plan = make_plan(snapshot, read_headers(snapshot), recipe(), changed)
    parts = {output.name: output for output in plan.outputs if output.source == name and output.role == "weight"}
    up = parts["model.layers.0.mlp.experts.3.up_proj.weight"]
    assert up.shape == (160, 64) and up.slice is not None
    assert (up.slice.expert, up.slice.start, up.slice.step, up.slice.transposed) == (3, 1, 2, True)


@pytest.mark.parametrize("name", ["gpt-oss", "gemma4-moe", "lfm2", "hunyuan-moe", "qwen3-vl-moe", "step3p7"])
def test_the_validator_finds_nothing_in_what_the_plan_makes(model_folder: Models, tmp_path: Path, name: str) -> None:
    source = model_folder(name)
    quantize(resolve(str(source)), plan_of(source, recipe()), tmp_path)
    report = validate(tmp_path, source=resolve(str(source)), architecture=architecture_of(source))
    assert [finding.sentence() for finding in report.findings if finding.check != "R2"] == []


@pytest.mark.parametrize(
    ("name", "is_read"), [("granitemoe", False), ("gemma4-moe", False), ("qwen3-moe", True), ("gpt-oss", True)]
)
def test_experts_that_transformers_cannot_read_back_are_told_by_plan_and_validator(
    model_folder: Models, tmp_path: Path, name: str, is_read: bool
) -> None:
    source = model_folder(name)
    plan = plan_of(source, recipe())
    quantize(resolve(str(source)), plan, tmp_path)
    report = validate(tmp_path, source=resolve(str(source)), architecture=architecture_of(source), depth="headers")
    told = [finding.severity for finding in report.findings if finding.check == "R2"]
    assert told == ([] if is_read else ["warning"]) and report.sound
    assert any("vLLM only" in note for note in plan.notes) is not is_read


def test_a_tied_head_is_ignored_by_its_own_name(model_folder: Models) -> None:
    tied = plan_of(model_folder("biogpt"), recipe())
    assert not any("output_projection" in tensor.name for tensor in tied.tensors)
    assert "output_projection" in tied.quantization_config["ignore"]


def test_a_kept_recurrent_mixer_is_ignored_by_vllms_name_too(model_folder: Models) -> None:
    """b_proj has a row for each head, so that blocks do not fit; GLM 5 Next does not say what its matrix is made of."""
    plan = plan_of(model_folder("kimi-linear"), recipe("fp8-block"))
    mixer = "model.layers.0.self_attn"
    assert {f"{mixer}.{leaf}" for leaf in ("q_proj", "b_proj", "in_proj_qkvbfg_a")} <= set(
        plan.quantization_config["ignore"]
    )
    assert f"{mixer}.o_proj" not in plan.quantization_config["ignore"]
