"""A converted folder: its companions, config and lineage, and no evidence of the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import reference_checkpoints as reference
from support.conversions import Models, config_of, to
from support.quantizing import tensors_of
from support.sample_folders import edit, gate_again, validation
from support.tiny_models import calibration_for, plan_of, recipe

import fp8pipe
from fp8pipe.convert import Conversion
from fp8pipe.errors import Refused
from fp8pipe.gate.publishable import require_publishable
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import RECORD_FILES, Checkpoint


def test_companions_are_copied_byte_for_byte_and_the_card_is_not(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    (source / "README.md").write_text("# accepted by the gate")
    (source / "modeling_own.py").write_text("raise SystemExit")
    (source / "hf_quant_config.json").write_text("{}")
    to("fp8", source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    gone = {"README.md", "hf_quant_config.json", "config.json", "model.safetensors.index.json"}
    for path in source.iterdir():
        if path.name not in gone and path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert names & {"README.md", "hf_quant_config.json"} == set()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(tmp_path / "out").keys()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    assert ours.pop("quantization_config") != theirs.pop("quantization_config") and ours == theirs


def test_the_config_of_a_composite_model_has_one_quantization_config(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config"), "hidden_size": 64}
    (source / "config.json").write_text(json.dumps(config))
    to("fp8", source, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["text_config"] == {"hidden_size": 64} and made["quantization_config"]["quant_method"] == "fp8"


def test_the_record_names_source_spelling_and_version(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    done = to("fp8", source, tmp_path / "out")
    assert Conversion.load(tmp_path / "out" / "fp8pipe" / "conversion.json") == done
    assert done.source_commit == resolve(str(source)).commit and done.model_id == "source"
    assert (done.source_method, done.method, done.version) == ("compressed-tensors", "fp8", fp8pipe.__version__)
    assert done.source_config == config_of(source) and done.source_fingerprint is None
    assert [file.name for file in (tmp_path / "out" / "fp8pipe").iterdir()] == ["conversion.json"]


@pytest.fixture(scope="module")
def gated(model_folder: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of fp8pipe with every record that a release leaves."""
    folder = tmp_path_factory.mktemp("gated") / "checkpoint"
    source = model_folder("llama")
    plan = plan_of(source, recipe("fp8-static-kv"))
    snapshot = resolve(str(source))
    quantize(snapshot, plan, folder, calibration=calibration_for(plan))
    snapshot.model_copy(update={"root": None}).save(folder / "fp8pipe" / "source.json")
    for name in ("validation", "policy", "baseline", "candidate", "gate", "approval", "manifest", "release"):
        (folder / "fp8pipe" / RECORD_FILES.get(name, f"{name}.json")).write_text("{}")
    (folder / "fp8pipe" / "plots").mkdir()
    (folder / "fp8pipe" / "plots" / "drop.png").write_bytes(b"png")
    (folder / "README.md").write_text("# accepted")
    return folder


def test_the_result_has_no_evidence_of_the_source(gated: Path, tmp_path: Path) -> None:
    done = to("fp8", gated, tmp_path / "out")
    records = tmp_path / "out" / "fp8pipe"
    own = {"source.json", "source_config.json", "calibration.json", "plan.json", "checkpoint.json", "conversion.json"}
    assert {path.name for path in records.iterdir()} == own
    assert not (tmp_path / "out" / "README.md").exists()
    theirs, ours = (Checkpoint.load(folder / "fp8pipe" / "checkpoint.json") for folder in (gated, tmp_path / "out"))
    assert done.source_fingerprint == theirs.fingerprint != ours.fingerprint == done.fingerprint
    with pytest.raises(Refused, match=r"validation\.json"):
        require_publishable(tmp_path / "out")


def test_the_records_of_the_result_describe_the_result(gated: Path, tmp_path: Path) -> None:
    to("fp8", gated, tmp_path / "out")
    plan = Plan.load(tmp_path / "out" / "fp8pipe" / "plan.json")
    headers = read_headers(resolve(str(tmp_path / "out")))
    assert [output.info for output in plan.outputs] == list(headers.tensors.values())
    assert plan.settings.checkpoint_format == "fp8" and plan.quantization_config == config_of(tmp_path / "out")
    checkpoint = Checkpoint.load(tmp_path / "out" / "fp8pipe" / "checkpoint.json")
    assert checkpoint.output_bytes == headers.nbytes == plan.output_bytes
    assert checkpoint.recipe_digest == plan.settings.digest()


def test_a_verdict_copied_from_the_source_is_refused(gated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    to("fp8", gated, folder)
    fingerprint = Checkpoint.load(gated / "fp8pipe" / "checkpoint.json").fingerprint
    validation(folder).save(folder / "fp8pipe" / "validation.json")
    gate_again(folder)
    edit(folder, candidate_fingerprint=fingerprint)
    with pytest.raises(Refused, match="the gate decided on checkpoint"):
        require_publishable(folder)


def test_an_altered_checkpoint_of_fp8pipe_has_no_lineage(gated: Path, tmp_path: Path) -> None:
    altered = shutil.copytree(gated, tmp_path / "altered")
    shard = sorted(altered.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    save_file(tensors | {"extra.bias": torch.zeros(2)}, shard, {"format": "pt"})
    index = json.loads((altered / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra.bias"] = shard.name
    (altered / "model.safetensors.index.json").write_text(json.dumps(index))
    done = to("fp8", altered, tmp_path / "out")
    assert done.source_fingerprint is None
    assert [path.name for path in (tmp_path / "out" / "fp8pipe").iterdir()] == ["conversion.json"]
