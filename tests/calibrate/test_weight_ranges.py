"""Calibration keeps the range of each weight, and quantizing with it reads every byte of the source once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.calibration import STATIC_KV, TENSOR_KV, make_model, planned, run_calibration, with_data, write_dataset
from support.quantizing import bytes_of, tensors_of, weight_behind

from fp8pipe.config import Recipe, WeightScheme
from fp8pipe.errors import InputError
from fp8pipe.hub.source import resolve
from fp8pipe.model.shards import SourceFiles
from fp8pipe.progress import ProgressEvent
from fp8pipe.quantize import quantize

MSE = TENSOR_KV.model_copy(update={"weights": WeightScheme(strategy="tensor", observer="mse")})


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all reads from source files."""
    sizes: list[int] = []
    original = SourceFiles.read_into

    def read_into(self: SourceFiles, shard: str, offset: int, buffer: memoryview, what: str) -> None:
        sizes.append(len(buffer))
        original(self, shard, offset, buffer, what)

    monkeypatch.setattr(SourceFiles, "read_into", read_into)
    return sizes


def _calibrated(root: Path, name: str, recipe: Recipe, **changes: Any) -> tuple[Path, Any, Any]:
    """A model with its plan and its calibration."""
    model = root / "model"
    make_model(model, name, **changes)
    recipe = with_data(recipe, write_dataset(root / "data.jsonl"))
    snapshot, plan, _ = planned(model, recipe)
    assert snapshot.commit == plan.source_commit
    return model, plan, run_calibration(model, recipe, root / "calibration")


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "qwen3_moe", "llama4", "granitemoe"])
def test_quantizing_after_calibration_reads_every_byte_once(name: str, tmp_path: Path, read: list[int]) -> None:
    recipe = TENSOR_KV.model_copy(update={"kv_cache": None})
    model, plan, calibration = _calibrated(tmp_path, name, recipe)
    source = tensors_of(model)
    weights = [output for output in plan.outputs if output.role == "weight"]
    assert calibration.weights == {
        one.name: float(weight_behind(source[one.source], one.slice, one.shape[0]).abs().max()) for one in weights
    }
    snapshot = resolve(str(model))
    read.clear()
    quantize(snapshot, plan, tmp_path / "once", calibration=calibration)
    assert sum(read) == sum(tensor.end - tensor.begin for tensor in plan.tensors)
    quantize(snapshot, plan, tmp_path / "twice", calibration=calibration.model_copy(update={"weights": {}}))
    once, twice = bytes_of(tmp_path / "once"), bytes_of(tmp_path / "twice")
    differing = {path for path in once if once[path] != twice[path]}
    assert differing == {"fp8pipe/calibration.json"}


def test_the_mse_observer_reads_twice_and_finds_the_same_range(tmp_path: Path, read: list[int]) -> None:
    model, plan, calibration = _calibrated(tmp_path, "llama", MSE)
    snapshot = resolve(str(model))
    read.clear()
    quantize(snapshot, plan, tmp_path / "kept", calibration=calibration)
    quantized = {output.source for output in plan.outputs if output.role == "weight"}
    sizes = {tensor.name: tensor.end - tensor.begin for tensor in plan.tensors}
    assert sum(read) == sum(size * (1 + (name in quantized)) for name, size in sizes.items())
    quantize(snapshot, plan, tmp_path / "measured", calibration=calibration.model_copy(update={"weights": {}}))
    kept, measured = tensors_of(tmp_path / "kept"), tensors_of(tmp_path / "measured")
    assert all(kept[name].float().equal(measured[name].float()) for name in measured)


def test_ranges_of_layers_that_an_interrupted_calibration_finished_are_kept(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama")
    recipe = with_data(TENSOR_KV, write_dataset(tmp_path / "data.jsonl"))

    def interrupt(event: ProgressEvent) -> None:
        if event.done > 2.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_calibration(tmp_path / "model", recipe, tmp_path / "out", interrupt)
    resumed = run_calibration(tmp_path / "model", recipe, tmp_path / "out")
    assert len(resumed.weights) == 4 * 7
    assert resumed.weights == run_calibration(tmp_path / "model", recipe, tmp_path / "undisturbed").weights


def test_weights_with_scales_per_row_need_no_range(tmp_path: Path) -> None:
    assert _calibrated(tmp_path, "llama", STATIC_KV)[2].weights == {}


def test_a_range_of_a_weight_that_cannot_be_is_refused(tmp_path: Path) -> None:
    model, plan, calibration = _calibrated(tmp_path, "llama", TENSOR_KV)
    wrong = calibration.model_copy(update={"weights": dict.fromkeys(calibration.weights, -1.0)})
    with pytest.raises(InputError, match="negative or not finite"):
        quantize(resolve(str(model)), plan, tmp_path / "out", calibration=wrong)
