"""A range that cannot become a scale is an error that names the module: NaN, Inf, and zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.calibration import STATIC_KV, TENSOR_KV, calibrated, make_model, run_calibration, with_data, write_dataset

from fp8pipe.config import ActivationScheme, KVCacheScheme
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


@pytest.mark.parametrize(("strategy", "values"), [("head", (0,)), ("head", (0, 1)), ("tensor", (0, 1))])
def test_keys_and_values_that_are_always_zero_get_scale_one_and_the_record_says_so(
    tmp_path: Path, strategy: str, values: tuple[int, ...]
) -> None:
    model = make_model(tmp_path / "model", "llama")  # two KV heads of 16
    with torch.no_grad():
        for head in values:
            model.get_parameter("model.layers.1.self_attn.v_proj.weight")[16 * head : 16 * head + 16] = 0
            model.get_parameter("model.layers.1.self_attn.k_proj.weight")[16 * head : 16 * head + 16] = 0
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    recipe = TENSOR_KV.model_copy(update={"kv_cache": KVCacheScheme.model_validate({"strategy": strategy})})
    if len(values) == 2:  # o_proj reads nothing but zeros then
        recipe = recipe.model_copy(update={"ignore": ("model.layers.1.self_attn.o_proj",)})
    found = calibrated(tmp_path, recipe)
    ranges = found.kv["model.layers.1.self_attn"]
    for head, amax in enumerate(ranges.v_amax):
        assert (amax == 448.0) == (strategy == "tensor" or head in values)
    assert found.assumed.keys() == {f"model.layers.1.self_attn.{leaf}" for leaf in ("k_scale", "v_scale")}
