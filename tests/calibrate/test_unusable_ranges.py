"""A range that cannot become a scale is an error that names the module: NaN, Inf, and zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.calibration import STATIC_KV, calibrated, make_model, run_calibration, with_data, write_dataset

from fp8pipe.config import ActivationScheme
from fp8pipe.errors import CalibrationDataError, NonFiniteActivation


def test_a_nan_activation_is_an_error_that_names_the_module(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(float("inf"))
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    with pytest.raises(NonFiniteActivation, match=r"model\.layers\.1\.mlp\.down_proj: its input"):
        calibrated(tmp_path, STATIC_KV)
    assert not (tmp_path / "calibration" / "calibration.json").exists()


def make_model_with_zero_inputs(tmp_path: Path) -> Path:
    """A model whose second layer gives its down projection nothing but zeros."""
    model = make_model(tmp_path / "model", "llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").zero_()
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def test_an_input_that_is_always_zero_is_an_error_and_gets_no_made_up_scale(tmp_path: Path) -> None:
    model, data = make_model_with_zero_inputs(tmp_path), write_dataset(tmp_path / "data.jsonl")
    with pytest.raises(CalibrationDataError, match=r"1\.mlp\.down_proj: its input has a range of 0: every value"):
        run_calibration(model, with_data(STATIC_KV, data), tmp_path / "out")
    dynamic = STATIC_KV.model_copy(update={"activations": ActivationScheme(mode="dynamic", strategy="token")})
    assert run_calibration(model, with_data(dynamic, data), tmp_path / "dynamic").inputs == {}


def test_a_percentile_below_the_share_of_zeros_is_an_error(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "opt")
    with torch.no_grad():  # a ReLU that lets few values through
        model.get_parameter("model.decoder.layers.0.fc1.bias").fill_(-0.3)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    low = ActivationScheme(mode="static", strategy="tensor", observer="percentile", percentile=51.0)
    with pytest.raises(CalibrationDataError, match=r"fc2: its input has a range of 0: most of its values are 0"):
        calibrated(tmp_path, STATIC_KV.model_copy(update={"activations": low}))
