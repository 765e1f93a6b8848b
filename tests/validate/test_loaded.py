"""Depth loaded: transformers' own loader tells weights that are not the source's, whatever the plan believes."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizing import Models, edit_tensors
from support.tiny_models import architecture_of, recipe
from typer.testing import CliRunner

from fp8pipe import cli, stages
from fp8pipe.errors import InputError
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.machine.supervise import Ending, supervise
from fp8pipe.model.architecture import Architecture
from fp8pipe.oracle import loaded, loaded_probe
from fp8pipe.oracle.loaded_probe import _compared, compare_folders
from fp8pipe.oracle.loading import OnDisk
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import make_plan
from fp8pipe.validate import validate


def _made(source: Path, folder: Path, architecture: Architecture, name: str = "fp8-dynamic") -> Path:
    snapshot = resolve(str(source))
    quantize(snapshot, make_plan(snapshot, read_headers(snapshot), recipe(name), architecture), folder)
    return folder


def _believing(architecture: Architecture, **wrong: bool) -> Architecture:
    """The record with another layout of its 3-D experts."""
    tensors = {
        name: role.model_copy(update={"layout": role.layout.model_copy(update=wrong)}) if role.layout else role
        for name, role in architecture.tensors.items()
    }
    return architecture.model_copy(update={"tensors": tensors})


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-vl-moe", "phi3", "mixtral"])
def test_every_parameter_is_the_sources_within_the_error_of_fp8(
    model_folder: Models, tmp_path: Path, name: str
) -> None:
    source = model_folder(name)
    found = compare_folders(_made(source, tmp_path / "out", architecture_of(source)), source)
    assert [one for one in found if one.fault or one.incomparable] == []
    errors = [one.error for one in found if one.quantized]
    assert errors and all(0.02 < error < 0.03 for error in errors)
    assert {one.error for one in found if not one.quantized} == {0.0}


def test_an_expert_too_small_for_codes_is_no_wrong_weight(model_folder: Models, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("mixtral", shard_size="1GB"), source)
    tiny = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    edit_tensors(source, lambda tensors: tensors.update({tiny: tensors[tiny] * 1e-21}))
    folder = _made(source, tmp_path / "out", architecture_of(source))
    assert max(one.error for one in compare_folders(folder, source)) < 0.03


@pytest.mark.parametrize("value", [torch.nan, 1.0])
def test_a_parameter_of_zeros_is_no_excuse_for_what_the_checkpoint_holds(value: float) -> None:
    zeros, ours = torch.zeros(2, 2), torch.full((2, 2), value)
    assert _compared("weight", ours, zeros, quantized=False).error == math.inf
    assert _compared("weight", zeros, zeros, quantized=False).error == 0.0


@pytest.mark.parametrize("wrong", [{"interleaved": True}, {"transposed": True}], ids=str)
def test_a_wrong_belief_about_experts_passes_fidelity_and_not_the_loader(
    model_folder: Models, tmp_path: Path, wrong: dict[str, bool]
) -> None:
    source = model_folder("qwen3-vl-moe")
    belief = _believing(architecture_of(source), **wrong)
    folder = _made(source, tmp_path / "out", belief)
    validated = validate(folder, source=resolve(str(source)), architecture=belief, depth="fidelity")
    assert not [finding for finding in validated.errors if finding.check[0] in "VD"]
    bad = {one.name for one in compare_folders(folder, source) if one.fault or one.error > 0.06}
    assert bad and all(".experts." in name for name in bad)


def test_a_tensor_without_a_place_and_an_empty_place_are_findings(model_folder: Models, tmp_path: Path) -> None:
    source = model_folder("llama", shard_size="1GB")
    folder = _made(source, tmp_path / "out", architecture_of(source))
    edit_tensors(folder, lambda tensors: tensors.update({"model.extra.weight": tensors.pop("model.norm.weight")}))
    report = validate(folder, source=resolve(str(source)), architecture=architecture_of(source), depth="loaded")
    assert report.depth == "loaded" and {"L1", "L2"} <= set(report.checks)
    found = {finding.check: finding for finding in report.findings}
    assert found["L1"].tensor == "model.norm.weight" and "does not fill" in found["L1"].found
    assert found["L2"].tensor == "model.extra.weight" and "no such tensor" in found["L2"].found


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -9 $$", r"was ended \(status 137\).*memory"),
        ('echo \'{"memory": "no room"}\' > $1', r"memory ran out.*no room"),
    ],
    ids=["killed", "allocator"],
)
def test_child_that_has_too_little_memory_says_nothing_of_the_model_and_costs_its_own_checks_alone(
    model_folder: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    def starved(command: list[str], **given: Any) -> Ending:
        assert given["memory_bytes"] > 8_000_000_000, "as much as its layers take, and no more"
        return supervise(["sh", "-c", script, "sh", command[-1]], **given)

    monkeypatch.setattr(loaded, "supervise", starved)
    source = model_folder("llama", shard_size="1GB")
    folder = _made(source, tmp_path / "out", architecture_of(source))
    report = stages.validate_model(str(folder), source=str(source), depth="loaded", oracles=False)
    assert report.sound and report.depth == "fidelity" and "D1" in report.checks and "L1" not in report.checks
    assert re.search(words, report.loaded_silent)
    shown = CliRunner().invoke(
        cli.app, ["validate", str(folder), "--source", str(source), "--depth", "loaded", "--no-oracles", "--json"]
    )
    assert shown.exit_code == 4 and json.loads(shown.stdout)["loaded_silent"] == report.loaded_silent


def test_allocator_of_the_loader_is_no_unreadable_tensor(
    model_folder: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' loader catches the error and keeps its text."""
    source = model_folder("llama", shard_size="1GB")

    def no_room(self: OnDisk, index: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(OnDisk, "__getitem__", no_room)
    asked, answer = tmp_path / "asked.json", tmp_path / "answer.json"
    asked.write_text(json.dumps({"checkpoint": str(source), "source": str(source)}))
    monkeypatch.setattr(sys, "argv", ["loaded_probe", str(asked), str(answer)])
    loaded_probe.main()
    assert "can't allocate memory" in json.loads(answer.read_bytes())["memory"]


def test_weights_that_cannot_be_read_are_not_loaded(
    model_folder: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_folder("llama", shard_size="1GB")
    folder = _made(source, tmp_path / "out", architecture_of(source))
    (folder / "model.safetensors").write_bytes(b"nothing")
    monkeypatch.setattr(loaded, "compare", None)
    report = validate(folder, source=resolve(str(source)), architecture=architecture_of(source), depth="loaded")
    assert not report.sound and "no whole set of weight files (F1)" in report.loaded_silent


def test_without_a_source_it_is_a_wrong_request(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--source"):
        validate(tmp_path, depth="loaded")


def test_layers_that_are_not_numbered_like_a_decoders_have_no_gaps(model_folder: Models, tmp_path: Path) -> None:
    source = model_folder("bert")
    architecture = architecture_of(source)
    folder = _made(source, tmp_path / "out", architecture)
    assert not validate(folder, source=resolve(str(source)), architecture=architecture).errors


def test_a_tied_head_that_stands_before_its_embedding_is_not_missed(model_folder: Models) -> None:
    assert architecture_of(model_folder("camembert")).misfits == ()
