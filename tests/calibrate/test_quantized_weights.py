"""quantized_weights: ranges are those of the model that the FP8 checkpoint stands for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.calibration import STATIC_KV, make_model, planned, run_calibration, with_data, write_dataset
from support.whole_model import CLOSE

from fp8pipe.config import ActivationScheme, Recipe, WeightScheme
from fp8pipe.quantize import quantize
from fp8pipe.quantize.numerics import dequantize


def dequantized_twin(model: Path, recipe: Recipe, root: Path) -> Path:
    """The model with every weight that `recipe` quantizes replaced by the engine's codes times scales."""
    per_tensor = recipe.weights.strategy == "tensor"
    changes = {
        "kv_cache": None,
        "activations": ActivationScheme(strategy="tensor" if per_tensor else "token"),
        "checkpoint_format": "fp8" if per_tensor else "compressed-tensors",
    }
    snapshot, plan, _ = planned(model, recipe.model_copy(update=changes))
    quantize(snapshot, plan, root / "fp8")
    tensors: dict[str, torch.Tensor] = {}
    for path in (root / "fp8").glob("*.safetensors"):
        tensors |= load_file(path)
    twin = Path(shutil.copytree(model, root / "twin"))
    for path in twin.glob("*.safetensors"):
        content = {}
        for name, weight in load_file(path).items():
            scale = tensors.get(f"{name}_scale")
            block = recipe.weights.block_shape if recipe.weights.strategy == "block" else None
            content[name] = weight if scale is None else dequantize(tensors[name], scale, block=block)
        save_file(content, path, metadata={"format": "pt"})
    return twin


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("llama", WeightScheme(strategy="tensor")),
        ("llama", WeightScheme(strategy="tensor", observer="mse")),
        ("qwen2", WeightScheme(strategy="channel", observer="mse")),
        ("mixtral", WeightScheme(strategy="tensor")),
    ],
    ids=["tensor", "tensor-mse", "channel-mse", "experts"],
)
def test_ranges_through_fp8_weights_equal_those_of_the_dequantized_checkpoint(
    name: str, weights: WeightScheme, tmp_path: Path
) -> None:
    make_model(tmp_path / "model", name)
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl")).model_copy(update={"weights": weights})
    plain = run_calibration(tmp_path / "model", recipe, tmp_path / "plain")
    through = with_data(recipe, tmp_path / "data.jsonl", quantized_weights=True)
    found = run_calibration(tmp_path / "model", through, tmp_path / "through")
    twin = dequantized_twin(tmp_path / "model", recipe, tmp_path)
    expected = run_calibration(twin, recipe, tmp_path / "expected")
    assert found.inputs == pytest.approx(expected.inputs, rel=CLOSE)
    assert {n: kv.k_amax for n, kv in found.kv.items()} == {
        n: pytest.approx(kv.k_amax, rel=CLOSE) for n, kv in expected.kv.items()
    }
    assert found.inputs != pytest.approx(plain.inputs, rel=1e-3)
    assert found.key != plain.key
    figures = [plain.sensitivity, found.sensitivity]
    weight_figures = [{n: one.weight_sqnr_db for n, one in of.items()} for of in figures]
    assert weight_figures[1] == pytest.approx(weight_figures[0], abs=0.5)  # measured before the weights are rounded
