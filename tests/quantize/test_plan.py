"""The plan accounts for every tensor and every byte before the first weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.quantizing import Models, edit_tensors
from support.tiny_models import plan_of, recipe
from torch import Tensor

from fp8pipe.errors import DiskTooSmall, MalformedCheckpoint
from fp8pipe.quantize.plan import Plan, check_disk


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


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight"]


def too_short(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"][:-1].clone()


def headless(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]


def a_layer_more(tensors: dict[str, Tensor]) -> None:
    """As if someone had lowered num_hidden_layers."""
    last = "model.layers.1."
    tensors |= {name.replace(last, "model.layers.2."): t.clone() for name, t in tensors.items() if last in name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (headless, r"lm_head\.weight: not on disk"),
        (a_layer_more, r"model\.layers\.2: a decoder layer on disk, beyond the 2 of config\.json"),
        (missing, r"model\.layers\.1\.mlp\.down_proj\.weight: not on disk"),
        (too_short, r"model\.layers\.0\.input_layernorm\.weight: \[\d+\] on disk, \[\d+\] in the model"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused_from_headers(
    model_folder: Models, tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    shutil.copytree(model_folder("llama", shard_size="1GB"), tmp_path / "model")
    edit_tensors(tmp_path / "model", damage)
    with pytest.raises(MalformedCheckpoint, match=rf"{message}.*download the model again"):
        plan_of(tmp_path / "model", recipe())


def test_a_layer_that_predicts_a_second_token_is_no_layer_too_many(model_folder: Models, tmp_path: Path) -> None:
    def predictor(tensors: dict[str, Tensor]) -> None:
        a_layer_more(tensors)
        tensors["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)

    shutil.copytree(model_folder("llama", shard_size="1GB"), tmp_path / "model")
    edit_tensors(tmp_path / "model", predictor)
    kept = {tensor.name for tensor in plan_of(tmp_path / "model", recipe()).tensors if tensor.action == "keep"}
    assert "model.layers.2.mlp.up_proj.weight" in kept


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


def test_shards_keep_their_names_but_a_single_one_gets_the_name_loaders_expect(
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


def test_a_plan_is_the_same_after_saving_and_loading(model_folder: Models, tmp_path: Path) -> None:
    plan = plan_of(model_folder("llama"), recipe("fp8-static-kv"))
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


def test_a_disk_that_is_too_small_is_an_error_with_both_sizes(model_folder: Models, tmp_path: Path) -> None:
    plan = plan_of(model_folder("llama"), recipe())
    check_disk(plan, tmp_path / "not" / "there" / "yet")
    with pytest.raises(DiskTooSmall, match=r"takes 1000000\.00 GB, [\d.]+ GB are free"):
        check_disk(plan.model_copy(update={"output_bytes": 10**15}), tmp_path / "out")
