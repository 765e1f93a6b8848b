"""Stages as the commands and tasks call them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from support.nvidia_smi import MACHINES
from support.tiny_models import make_model

from fp8pipe import stages
from fp8pipe.config import Parallel, load_policy, load_recipe, load_suite
from fp8pipe.errors import EnvironmentFault, NoSuitableDevice
from fp8pipe.hub.client import client
from fp8pipe.progress import ProgressEvent
from fp8pipe.quantize import JOURNAL_NAME
from fp8pipe.records import RECORD_DIR, ValidationReport, record_path
from fp8pipe.rehearsal.localhub import Disruption, LocalHub


@pytest.fixture
def model(hub: LocalHub, repo_id: str, tmp_path: Path) -> str:
    """A model in several shards, on the Hub."""
    folder = make_model(tmp_path / "model")
    api = client()
    api.create_repo(repo_id)
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    return repo_id


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_release_is_spread_over_the_fewest_gpus_that_hold_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = stages.pin(str(make_model(tmp_path / "model")))
    small = stages.plan(snapshot, load_recipe("fp8-dynamic"), oracles=False)
    suite, policy = load_suite("gsm8k"), load_policy("gsm8k")
    suite = suite.model_copy(update={"engine": {"max_model_len": 64}})
    MACHINES["8 x H100"].become(tmp_path / "bin", monkeypatch)
    assert stages.require_machine(snapshot, small, suite, policy) == (Parallel(), ())
    large = small.model_copy(update={"source_bytes": 141 * 10**9})
    assert stages.require_machine(snapshot, large, suite, policy) == (Parallel(tensor=2), ())
    MACHINES["H100"].become(tmp_path / "bin", monkeypatch)
    with pytest.raises(NoSuitableDevice, match=r"unquantized takes 141\.0 GB.*it takes 2 such GPUs.*may use 1"):
        stages.require_machine(snapshot, large, suite, policy)


def test_a_model_on_the_hub_is_quantized_while_it_arrives(
    model: str, break_hub: Callable[..., None], tmp_path: Path
) -> None:
    recipe, out = load_recipe("fp8-dynamic"), tmp_path / "out"
    remote = stages.pin(model)
    plan = stages.plan(remote, recipe)
    last = sorted({tensor.shard for tensor in plan.tensors})[-1]
    break_hub(Disruption(path=f"/resolve/.*{last}", method="GET", action="status", status=503, times=1000))
    with pytest.raises(EnvironmentFault):
        stages.quantize(remote, plan, out, calibration=None)
    finished = (out / RECORD_DIR / JOURNAL_NAME).read_text().count('"weight"')
    assert 0 < finished < len(plan.outputs), "what had arrived was quantized before the rest was there"
    assert not (out / "config.json").exists()

    break_hub()
    events: list[ProgressEvent] = []
    _, here = stages.quantize(remote, plan, out, calibration=None, progress=events.append)
    assert {event.stage for event in events} == {"quantize"}
    assert here.root is not None and (here.path / last).exists()
    local = stages.pin(str(tmp_path / "model"))
    stages.quantize(local, stages.plan(local, recipe), tmp_path / "other", calibration=None)
    assert bytes_of(out) == bytes_of(tmp_path / "other")


def test_a_finished_checkpoint_still_brings_its_source(model: str, tmp_path: Path) -> None:
    remote = stages.pin(model)
    plan = stages.plan(remote, load_recipe("fp8-dynamic"))
    first, here = stages.quantize(remote, plan, tmp_path / "out", calibration=None)
    lost = here.path / "config.json"
    lost.unlink()
    again, here = stages.quantize(remote, plan, tmp_path / "out", calibration=None)
    assert again == first and lost.exists()


def test_a_plan_of_a_model_on_the_hub_reads_headers_and_nothing_else(
    model: str, hub: LocalHub, break_hub: Callable[..., None], tmp_path: Path
) -> None:
    recipe = load_recipe("fp8-dynamic")
    folder = stages.pin(str(tmp_path / "model"))
    shards = {file.name: file.size for file in folder.files if file.name.endswith(".safetensors")}
    break_hub(*(Disruption(path=f"/resolve/.*{name}", action="status", after=1) for name in shards))
    remote = stages.plan(stages.pin(model), recipe)
    local = stages.plan(folder, recipe)
    assert remote.outputs == local.outputs and remote.quantization_config == local.quantization_config
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    with urllib.request.urlopen(f"{hub.endpoint}/_disruptions") as answer:
        assert [one["met"] for one in json.load(answer)] == [1] * len(shards), "one request for each header"


@pytest.fixture
def quantized(tmp_path: Path) -> tuple[Path, Path]:
    """A source, and the checkpoint made from it."""
    source, folder = make_model(tmp_path / "source"), tmp_path / "checkpoint"
    stages.quantize_model(str(source), load_recipe("fp8-dynamic"), folder)
    return source, folder


def recorded(folder: Path) -> ValidationReport:
    return ValidationReport.load(record_path(folder, "validation"))


def test_a_shallow_validation_does_not_replace_a_deep_one(quantized: tuple[Path, Path]) -> None:
    source, folder = quantized
    stages.validate(folder, source=stages.pin(str(source)), oracles=False)
    shallow = stages.validate_model(str(folder), depth="headers", oracles=False)
    assert shallow.depth == "headers"
    assert recorded(folder).depth == "fidelity"

    config = folder / "generation_config.json"
    config.write_text('{"temperature": 0.5}')
    stages.validate_model(str(folder), depth="headers", oracles=False)
    assert recorded(folder).depth == "headers", "the deep report was on another state of the folder"


def test_a_report_is_reused_only_where_it_read_as_much(quantized: tuple[Path, Path]) -> None:
    source, folder = quantized
    pinned = stages.pin(str(source))
    assert stages.validate(folder, source=None, oracles=False).depth == "values"
    assert stages.validate(folder, source=pinned, oracles=False).depth == "fidelity"
    assert stages.validate(folder, source=None, oracles=False).depth == "fidelity"


def test_validating_against_a_wrong_source_does_not_condemn_the_checkpoint(
    quantized: tuple[Path, Path], tmp_path: Path
) -> None:
    source, folder = quantized
    wrong = make_model(tmp_path / "wrong", seed=7)
    assert not stages.validate_model(str(folder), source=str(wrong), oracles=False).sound
    assert not recorded(folder).sound
    assert stages.validate(folder, source=stages.pin(str(source)), oracles=False).sound
    assert recorded(folder).sound
