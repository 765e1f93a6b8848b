"""The plan decides everything from headers: what, why, where; and refuses what vLLM could not serve."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import architecture_of, plan_of, recipe
from torch import Tensor

from fp8pipe.errors import (
    ConfigError,
    DiskTooSmall,
    InputError,
    MalformedCheckpoint,
    UnmatchedEntry,
    UnsupportedArchitecture,
)
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.architecture import ExpertLayout, TensorRole
from fp8pipe.quantize.plan import Plan, check_disk, make_plan

Models = Callable[..., Path]


def kept(plan: Plan) -> dict[str, str]:
    return {tensor.name: tensor.reason for tensor in plan.tensors if tensor.action == "keep"}


def test_a_plan_reads_no_weight(model_folder: Models, tmp_path: Path) -> None:
    folder = tmp_path / "hollow"
    shutil.copytree(model_folder("llama"), folder)
    expected = plan_of(model_folder("llama"), recipe())
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            end = 8 + int.from_bytes(file.read(8), "little")
            file.truncate(end)
            file.truncate(size)
    assert plan_of(folder, recipe()).outputs == expected.outputs


def without(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight"]


def cut(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without, r"model\.layers\.1\.mlp\.down_proj\.weight: not on disk"),
        (cut, r"model\.layers\.0\.input_layernorm\.weight: \[\d+\] on disk, \[\d+\] in the model"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_from_headers(
    model_folder: Models, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    shutil.copytree(model_folder("llama", shard_size="1GB"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(MalformedCheckpoint, match=rf"{says}.*download the model again"):
        plan_of(tmp_path / "model", recipe())


def test_every_source_tensor_is_accounted_for_once(model_folder: Models) -> None:
    for name in ("llama", "qwen3-moe", "deepseek-v2", "opt"):
        plan = plan_of(model_folder(name), recipe())
        made = [output.source for output in plan.outputs if output.role in {"copy", "weight"}]
        assert sorted(made) == sorted(tensor.name for tensor in plan.tensors)
        assert len({output.name for output in plan.outputs}) == len(plan.outputs)


def test_output_bytes_are_known_before_the_first_byte_is_read(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama"), recipe())
    for name, outputs in plan.shards().items():
        position = outputs[0].begin
        for output in outputs:
            assert output.begin == position and output.shard == name
            position = output.end
    assert plan.output_bytes == sum(outputs[-1].end for outputs in plan.shards().values())
    assert plan.output_bytes < 0.75 * plan.source_bytes


def test_shards_keep_their_names_and_a_lone_one_is_called_as_loaders_expect(
    model_folder: Models, tmp_path: Path
) -> None:
    folder = model_folder("llama")
    assert set(plan_of(folder, recipe()).shards()) == {path.name for path in folder.glob("*.safetensors")}
    single = tmp_path / "single"
    shutil.copytree(model_folder("llama", shard_size="1GB"), single)
    (single / "model.safetensors").rename(single / "weights.safetensors")
    assert set(plan_of(single, recipe()).shards()) == {"model.safetensors"}


def test_summary_counts_and_bytes_add_up(model_folder: Models) -> None:
    plan = plan_of(model_folder("qwen3-moe"), recipe())
    rows = plan.summary()
    assert sum(row.tensors for row in rows) == len(plan.tensors)
    assert sum(row.output_bytes for row in rows) == sum(output.end - output.begin for output in plan.outputs)
    assert rows[0].action == "quantize"
    assert any("router" in row.reason for row in rows)


def test_a_plan_survives_its_file(model_folder: Models, tmp_path: Path) -> None:
    plan = plan_of(model_folder("llama"), recipe("fp8-static-kv"))
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


# ---------------------------------------------------------------------------------------------- targets and ignore


def test_ignored_modules_are_kept_with_the_reason_and_named_in_the_config(model_folder: Models) -> None:
    plan = plan_of(
        model_folder("llama"), recipe(ignore=["model.layers.0.mlp.down_proj", r"re:.*layers\.1\.self_attn.*"])
    )
    names = {name for name, reason in kept(plan).items() if reason == "the recipe ignores it"}
    attention = {f"model.layers.1.self_attn.{leaf}_proj.weight" for leaf in "qkvo"}
    assert names == {"model.layers.0.mlp.down_proj.weight"} | attention
    ignore = plan.quantization_config["ignore"]
    assert {name.removesuffix(".weight") for name in names} < set(ignore)
    assert "lm_head" in ignore


def test_targets_restrict_what_is_quantized(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama"), recipe(targets=[r"re:.*mlp\.(gate|up)_proj"]))
    quantized = {tensor.name.split(".")[-2] for tensor in plan.tensors if tensor.action == "quantize"}
    assert quantized == {"gate_proj", "up_proj"}
    assert "model.layers.0.self_attn.q_proj" in plan.quantization_config["ignore"]


@pytest.mark.parametrize("field", ["targets", "ignore"])
@pytest.mark.parametrize("entry", ["model.layers.0.mlp.down_projection", "re:.*down_projj", r"re:layers\.0"])
def test_an_entry_that_matches_nothing_is_an_error_with_near_misses(
    model_folder: Models, field: str, entry: str
) -> None:
    with pytest.raises(UnmatchedEntry) as caught:
        plan_of(model_folder("llama"), recipe(**{field: [entry]}))
    assert field in str(caught.value) and entry.removeprefix("re:").replace("\\", "\\\\") in str(caught.value)
    if "down" in entry:
        assert re.search(r"near: .*mlp\.down_proj[,;]", str(caught.value))


def test_every_entry_that_matches_nothing_is_named_at_once(model_folder: Models) -> None:
    targets, ignore = ["Linear", "re:.*q_projj", "re:.*up_projj"], ["re:.*k_projj", "lm_head"]
    with pytest.raises(UnmatchedEntry) as caught:
        plan_of(model_folder("llama"), recipe(targets=targets, ignore=ignore))
    lines = str(caught.value).splitlines()
    assert [line.split(" matches ")[0] for line in lines] == [
        "targets: 're:.*q_projj'",
        "targets: 're:.*up_projj'",
        "ignore: 're:.*k_projj'",
    ]


@pytest.mark.parametrize(
    ("model", "entry", "reason"),
    [
        ("llama", "model.embed_tokens", "embedding"),
        ("llama", "model.layers.0.input_layernorm", "fewer than two dimensions"),
        ("llama", "lm_head", "lm_head"),
        ("llama", "re:.*norm", "fewer than two dimensions"),
        ("qwen3-moe", "model.layers.0.mlp.gate", "router"),
        ("gpt-oss", "model.layers.0.mlp.experts", "experts with biases"),
    ],
)
def test_a_target_that_cannot_be_quantized_is_an_error_that_says_why(
    model_folder: Models, model: str, entry: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(repr(entry))} names .* cannot be quantized .*{reason}"):
        plan_of(model_folder(model), recipe(targets=["Linear", entry]))


def test_a_target_that_vllm_cannot_cut_into_blocks_is_an_error_that_says_why(model_folder: Models) -> None:
    with pytest.raises(ConfigError, match="do not begin at blocks of 128"):
        plan_of(model_folder("llama"), recipe("fp8-block", targets=["re:.*(q|k|v)_proj"]))


def test_a_pattern_may_catch_more_than_can_be_quantized(model_folder: Models) -> None:
    plan = plan_of(model_folder("qwen3-moe"), recipe(targets=["re:.*mlp"]))
    assert kept(plan)["model.layers.0.mlp.gate.weight"].startswith("router")
    assert any(tensor.action == "quantize" for tensor in plan.tensors)


def test_lm_head_is_no_target_of_a_tied_model(model_folder: Models) -> None:
    with pytest.raises(UnmatchedEntry, match="lm_head"):
        plan_of(model_folder("llama-tied"), recipe(targets=["Linear", "lm_head"]))


def test_lm_head_always_counts_as_matched(model_folder: Models) -> None:
    plan_of(model_folder("llama-tied"), recipe(ignore=["lm_head"]))
    plan_of(model_folder("llama-tied"), recipe(ignore=["re:.*lm_head"]))


def test_a_pattern_that_is_none_is_a_config_error(model_folder: Models) -> None:
    with pytest.raises(ConfigError, match="regular expression"):
        plan_of(model_folder("llama"), recipe(ignore=["re:*"]))


def test_names_of_transformers_match_too(model_folder: Models) -> None:
    plan = plan_of(model_folder("mixtral"), recipe(ignore=["re:.*mlp.experts"]))
    assert not any("experts" in output.name for output in plan.outputs if output.role == "weight")
    assert r"re:.*layers\.0\.block_sparse_moe\.experts\..*" in plan.quantization_config["ignore"]


@pytest.mark.parametrize(
    ("model", "entry"),
    [("llama", "re:.*k_proj"), ("mixtral", r"re:.*experts\.2\.w1"), ("qwen3-moe", r"re:.*experts\.1\.")],
)
def test_half_of_what_vllm_fuses_cannot_be_kept(model_folder: Models, model: str, entry: str) -> None:
    with pytest.raises(ConfigError, match="one precision"):
        plan_of(model_folder(model), recipe(ignore=[entry]))


# ---------------------------------------------------------------------------------------------- what vLLM serves


def test_routers_are_kept_and_named_in_both_spellings(model_folder: Models) -> None:
    channel = plan_of(model_folder("mixtral"), recipe())
    assert "model.layers.1.block_sparse_moe.gate" in channel.quantization_config["ignore"]
    fp8 = plan_of(model_folder("mixtral"), recipe("autofp8-dynamic"))
    assert "model.layers.1.block_sparse_moe.gate" in fp8.quantization_config["ignored_layers"]
    assert not any(entry.startswith("re:") for entry in fp8.quantization_config["ignored_layers"])


def test_experts_need_a_scheme_that_vllm_has(model_folder: Models) -> None:
    per_tensor = {"weights": {"strategy": "tensor"}, "activations": {"mode": "dynamic", "strategy": "token"}}
    with pytest.raises(ConfigError, match="experts"):
        plan_of(model_folder("qwen3-moe"), recipe(**per_tensor))
    with pytest.raises(ConfigError, match="experts"):
        plan_of(model_folder("qwen3-moe"), recipe(activations=None))
    plan_of(model_folder("llama"), recipe(**per_tensor))
    plan_of(model_folder("qwen3-moe"), recipe("autofp8-dynamic"))


def test_blocks_keep_what_vllm_cannot_cut(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama"), recipe("fp8-block"))
    assert plan.outputs[0].shape  # something is quantized: o_proj and down_proj, alone in their matrix
    names = {tensor.name.split(".")[-2] for tensor in plan.tensors if tensor.action == "quantize"}
    assert names == {"o_proj", "down_proj"}
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


def test_fused_on_disk_is_kept_where_its_shards_do_not_fit_blocks(model_folder: Models) -> None:
    plan = plan_of(model_folder("phi3"), recipe("fp8-block"))
    assert {"model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"} <= set(kept(plan))


def test_static_activations_spare_the_absorbed_mla_projection(model_folder: Models) -> None:
    static = plan_of(model_folder("deepseek-v2"), recipe("fp8-static"))
    assert "identity" in kept(static)["model.layers.0.self_attn.kv_b_proj.weight"]
    dynamic = plan_of(model_folder("deepseek-v2"), recipe())
    assert "model.layers.0.self_attn.kv_b_proj.weight" not in kept(dynamic)


def test_nothing_to_quantize_is_refused(model_folder: Models) -> None:
    with pytest.raises(UnsupportedArchitecture, match="none of its tensors"):
        plan_of(model_folder("llama"), recipe(ignore=["re:.*"]))


# ---------------------------------------------------------------------------------------------- KV cache, 3-D experts


def test_kv_scales_lie_beside_their_attention(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama"), recipe("fp8-static-kv"))
    scales = {output.name: output for output in plan.outputs if output.role in {"k_scale", "v_scale"}}
    assert set(scales) == {f"model.layers.{i}.self_attn.{leaf}_scale" for i in (0, 1) for leaf in "kv"}
    shard_of = {output.name: output.shard for output in plan.outputs}
    shards = {shard_of[f"model.layers.0.self_attn.{leaf}_proj.weight"] for leaf in "qkvo"}
    assert scales["model.layers.0.self_attn.k_scale"].shard in shards
    assert scales["model.layers.0.self_attn.k_scale"].shape == (1,)


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
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if "experts" not in name}
    fused = {"gate_up_proj": torch.zeros(4, 64, 64), "down_proj": torch.zeros(4, 64, 32)}
    for layer in (0, 1):
        for name, value in fused.items():
            tensors[f"model.layers.{layer}.mlp.experts.{name}"] = value.clone().to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    plan = plan_of(folder, recipe())
    made = {output.name: output.shape for output in plan.outputs if ".experts." in output.name}
    whole = plan_of(model_folder("qwen3-moe"), recipe())
    assert made == {output.name: output.shape for output in whole.outputs if ".experts." in output.name}


def test_experts_that_lie_beside_their_module_on_disk_get_its_name(model_folder: Models) -> None:
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


def test_transposed_and_interleaved_experts_know_their_rows(tmp_path: Path, model_folder: Models) -> None:
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


# ---------------------------------------------------------------------------------------------- disk and sources


def test_a_disk_too_small_is_told_with_both_numbers(model_folder: Models, tmp_path: Path) -> None:
    plan = plan_of(model_folder("llama"), recipe())
    check_disk(plan, tmp_path / "not" / "there" / "yet")
    with pytest.raises(DiskTooSmall, match=r"takes 1000000\.00 GB, [\d.]+ GB are free"):
        check_disk(plan.model_copy(update={"output_bytes": 10**15}), tmp_path / "out")


def fp8_source(folder: Path, origin: Path, method: str = "fp8") -> Path:
    """A block-quantized copy of a tiny Llama, as DeepSeek publishes its models."""
    shutil.copytree(origin, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        rows, columns = tensors[name].shape
        tensors[name + "_scale_inv"] = torch.full((-(-rows // 128), -(-columns // 128)), 0.5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_source_that_is_fp8_is_refused_or_requantized_as_the_recipe_says(
    model_folder: Models, tmp_path: Path
) -> None:
    folder = fp8_source(tmp_path / "fp8", model_folder("llama", shard_size="1GB"))
    with pytest.raises(InputError, match="fp8_source: requantize"):
        plan_of(folder, recipe())
    plan = plan_of(folder, recipe(fp8_source="requantize", ignore=["re:.*down_proj"]))
    actions = {tensor.name: tensor for tensor in plan.tensors}
    assert actions["model.layers.0.self_attn.q_proj.weight"].action == "quantize"
    assert actions["model.layers.0.self_attn.q_proj.weight_scale_inv"].action == "drop"
    outputs = {output.name: output for output in plan.outputs}
    down = outputs["model.layers.0.mlp.down_proj.weight"]
    assert (down.role, down.dtype) == ("dequantize", "BF16")
    assert not any(name.endswith("scale_inv") for name in outputs)


O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("block", "scale", "names"),
    [
        ([128, 128], torch.ones(4, 4), r"weight_scale_inv: F32 \[4, 4\] for a weight of \[256, 512\], .* \[2, 4\]"),
        ([128, 128], torch.ones(1, 1), r"F32 \[1, 1\] .*\[2, 4\]"),
        ([128, 128], torch.ones(4, 2), r"F32 \[4, 2\] .*\[2, 4\]"),
        ([128, 128], torch.ones(8), r"F32 \[8\] .*\[2, 4\]"),
        ([128, 128], torch.ones(2, 4, dtype=torch.uint8), r"U8 \[2, 4\] .*F32, BF16"),
        ([128, 128], torch.ones(2, 4, dtype=torch.float64), "F64"),
        (None, torch.ones(2, 4), r"F32 \[2, 4\] .*\[256, 1\] \(config.json has no weight_block_size\)"),
        (None, torch.ones(512), r"F32 \[512\] "),
        ([128], torch.ones(2, 4), r"weight_block_size is \[128\], expected two sizes"),
        ([0, 128], torch.ones(2, 4), "expected two sizes"),
        ("128", torch.ones(2, 4), "expected two sizes"),
    ],
)
def test_scales_that_do_not_fit_their_fp8_weight_are_refused_by_name(
    model_folder: Models, tmp_path: Path, block: Any, scale: Tensor, names: str
) -> None:
    wide = model_folder("llama", shard_size="1GB", hidden_size=256, num_attention_heads=8, head_dim=64)
    folder = fp8_source(tmp_path / "fp8", wide)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        shape = (-(-rows // 128), -(-columns // 128)) if block is not None else (rows, 1)
        tensors[name + "_scale_inv"] = torch.ones(shape)
    tensors[O_PROJ + "_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"} | ({} if block is None else {"weight_block_size": block})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=names) as caught:
        plan_of(folder, recipe(fp8_source="requantize"))
    assert O_PROJ in str(caught.value) or "weight_block_size is" in str(caught.value)


@pytest.mark.parametrize("leaf", ["gate_up_proj", "gate_up_proj.weight"])
def test_fp8_experts_in_one_tensor_are_refused_by_name(model_folder: Models, tmp_path: Path, leaf: str) -> None:
    folder = fp8_source(tmp_path / "fp8", model_folder("llama", shard_size="1GB"))
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.0.mlp.experts.{leaf}"
    tensors |= {name: torch.zeros(2, 128, 64).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(2, 1, 1)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{re.escape(name)}: F8_E4M3 \[2, 128, 64\].*2-D"):
        plan_of(folder, recipe(fp8_source="requantize"))


def test_a_source_quantized_by_other_means_is_refused(model_folder: Models, tmp_path: Path) -> None:
    folder = fp8_source(tmp_path / "awq", model_folder("llama", shard_size="1GB"), method="awq")
    with pytest.raises(UnsupportedArchitecture, match="awq"):
        plan_of(folder, recipe(fp8_source="requantize"))
