"""Legacy names become those that vLLM reads today; a folder without any is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference_checkpoints as reference
from support.conversions import Tensors, config_of, edit, rename, same, to
from support.quantizing import tensors_of
from typer.testing import CliRunner

from fp8pipe.cli import app
from fp8pipe.convert.draft import Draft, unchanged
from fp8pipe.convert.legacy import migrate
from fp8pipe.errors import InputError
from fp8pipe.hub.source import resolve
from fp8pipe.model.headers import TensorInfo
from fp8pipe.validate import validate


def old_autofp8(tensors: Tensors, config: dict[str, Any]) -> None:
    """AutoFP8 before June 2024: act_scale, one kv_scale a layer, scales without dimensions."""
    assert rename(tensors, ".input_scale", ".act_scale") == 14
    assert rename(tensors, ".k_scale", ".kv_scale") == 2
    for name in [name for name in tensors if name.endswith("_scale")]:
        tensors[name] = tensors[name].reshape(())
    for layer in (0, 1):
        del tensors[f"model.layers.{layer}.self_attn.v_scale"]


def test_kv_scales_stay_where_vllm_looks_for_them() -> None:
    """To a name that ends in attn vLLM appends none of its own, so the second attn is no legacy."""
    names = ("transformer.h.0.attn.attn.k_scale", "transformer.h.0.attn.k_proj.v_scale", "a.self_attn.attn.k_scale")
    tensors = unchanged(TensorInfo(name, "F32", (1,), "x", 0, 4) for name in names)
    migrated = migrate(Draft("compressed-tensors", tensors, {}))
    assert [tensor.name for tensor in migrated.tensors] == [
        "transformer.h.0.attn.attn.k_scale",
        "transformer.h.0.attn.attn.v_scale",
        "a.self_attn.k_scale",
    ]


@pytest.mark.parametrize("shards", [1, 2])
def test_act_scale_and_kv_scale_become_what_vllm_reads(llama: Path, tmp_path: Path, shards: int) -> None:
    source = reference.quantize(llama, tmp_path / "source", method="fp8", kv="tensor")
    edit(source, old_autofp8, shards)
    done = to(None, source, tmp_path / "out")
    theirs, ours = tensors_of(source), tensors_of(tmp_path / "out")
    assert {(change.what, change.tensors) for change in done.changes} == {
        ("act_scale -> input_scale", 14),
        ("kv_scale -> k_scale, v_scale", 2),
    }
    assert not any(name.endswith(("act_scale", "kv_scale")) for name in ours)
    for name in (name for name in theirs if name.endswith(".act_scale")):
        assert torch.equal(ours[name.replace("act_scale", "input_scale")], theirs[name])
    for layer in (0, 1):
        at = f"model.layers.{layer}.self_attn"
        assert ours[f"{at}.k_scale"] == ours[f"{at}.v_scale"] == theirs[f"{at}.kv_scale"]
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == ours.keys()
    assert validate(tmp_path / "out", source=resolve(str(llama))).sound
    assert not validate(source).sound


def test_a_legacy_checkpoint_can_be_respelled_in_one_step(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", method="fp8", kv="tensor")
    today = to("compressed-tensors", source, tmp_path / "today")
    edit(source, old_autofp8)
    to("compressed-tensors", source, tmp_path / "out")
    ours, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "today")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "today") and today.changes
    for name, tensor in expected.items():
        if not name.endswith("v_scale"):
            assert torch.equal(ours[name], tensor)
    assert validate(tmp_path / "out", source=resolve(str(llama))).sound


@pytest.mark.parametrize(
    ("spelled", "method"),
    [
        (".self_attn.{x}_proj.{x}_scale", "compressed-tensors"),
        (".self_attn.attn.{x}_scale", "compressed-tensors"),
        (".self_attn.qkv_proj.{x}_scale", "fp8"),
        (".self_attn.{x}_proj.output_scale", "fp8"),
    ],
)
def test_kv_scales_of_other_tools_move_to_their_attention(
    llama: Path, tmp_path: Path, spelled: str, method: Any
) -> None:
    source = reference.quantize(llama, tmp_path / "source", method=method, kv="tensor")
    expected = tensors_of(source)

    def move(tensors: Tensors, _: dict[str, Any]) -> None:
        for x in "kv":
            assert rename(tensors, f".self_attn.{x}_scale", spelled.format(x=x)) == 2

    edit(source, move)
    to(None, source, tmp_path / "out")
    assert same(expected, tensors_of(tmp_path / "out"))


def test_per_tensor_scales_of_transformers_get_vllms_names(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", method="fp8")
    expected = tensors_of(source)

    def as_transformers(tensors: Tensors, config: dict[str, Any]) -> None:
        rename(tensors, ".weight_scale", ".weight_scale_inv")
        rename(tensors, ".input_scale", ".activation_scale")
        config["weight_block_size"] = None
        config["modules_to_not_convert"] = config.pop("ignored_layers")

    edit(source, as_transformers)
    done = to(None, source, tmp_path / "out")
    assert {change.what for change in done.changes} == {
        "activation_scale -> input_scale",
        "weight_scale_inv -> weight_scale",
    }
    assert same(expected, tensors_of(tmp_path / "out"))
    assert validate(tmp_path / "out", source=resolve(str(llama))).sound


def test_block_scales_keep_their_name_in_fp8(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", method="fp8", strategy="block", static=False)
    assert to(None, source, tmp_path / "out").changes == () and not (tmp_path / "out").exists()


def test_incomplete_configs_are_completed(moe: Path, tmp_path: Path) -> None:
    def edited(_: Tensors, config: dict[str, Any]) -> None:
        del config["activation_scheme"]
        config["ignored_layers"] = ["re:.*lm_head", "re:.*mlp\\.gate$"]

    source = edit(reference.quantize(moe, tmp_path / "source", method="fp8"), edited)
    done = to(None, source, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["activation_scheme"] == "static"
    assert config["ignored_layers"] == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert [change.tensors for change in done.changes] == [0, 0]
    assert same(tensors_of(source), tensors_of(tmp_path / "out"))
    assert validate(tmp_path / "out", source=resolve(str(moe))).sound


def test_a_legacy_name_beside_the_current_one_is_refused(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", method="fp8")
    at = "model.layers.0.mlp.up_proj"
    edit(source, lambda tensors, _: tensors.update({f"{at}.act_scale": torch.ones(1)}))
    with pytest.raises(InputError, match=rf"{at}\.input_scale: two tensors"):
        to(None, source, tmp_path / "out")


@pytest.mark.parametrize("wanted", [None, "compressed-tensors"])
def test_a_checkpoint_without_legacy_names_is_left_alone_and_the_command_says_so(
    llama: Path, tmp_path: Path, wanted: Any
) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    assert to(wanted, source, tmp_path / "out").changes == ()
    assert not (tmp_path / "out").exists()
    options = ["--migrate"] if wanted is None else ["--to", wanted]
    result = CliRunner().invoke(app, ["convert", str(source), *options])
    assert result.exit_code == 0 and "nothing was written" in " ".join(result.output.split())
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
