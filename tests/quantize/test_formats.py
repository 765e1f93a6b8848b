"""Each spelling writes what the parsers of its readers accept."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from support.tiny_models import plan_of, recipe

Models = Callable[..., Path]

SHIPPED = ["fp8-dynamic", "fp8-static", "fp8-static-kv", "fp8-block"]
AUTOFP8 = ["autofp8-static", "autofp8-dynamic"]


def config_of(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return plan_of(folder, recipe(name, **changes)).quantization_config


def shapes(folder: Path, name: str, role: str, **changes: Any) -> set[tuple[int, ...]]:
    plan = plan_of(folder, recipe(name, **changes))
    return {output.shape for output in plan.outputs if output.role == role}


@pytest.mark.parametrize("name", SHIPPED)
def test_compressed_tensors_parses_its_config(model_folder: Models, name: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    config = config_of(model_folder("llama"), name)
    parsed = QuantizationConfig.model_validate(config)
    (scheme,) = parsed.config_groups.values()
    wanted = recipe(name)
    assert scheme.weights is not None and scheme.weights.strategy == wanted.weights.strategy
    assert scheme.input_activations is not None and wanted.activations is not None
    assert scheme.input_activations.strategy == wanted.activations.strategy
    assert bool(scheme.input_activations.dynamic) == (wanted.activations.mode == "dynamic")
    assert (parsed.kv_cache_scheme is not None) == (wanted.kv_cache is not None)
    assert isinstance(config["ignore"], list) and config["format"] == "float-quantized"


def test_weight_only_has_no_input_activations(model_folder: Models) -> None:
    config = config_of(model_folder("llama"), "fp8-dynamic", activations=None)
    assert config["config_groups"]["group_0"]["input_activations"] is None
    assert config["format"] == "naive-quantized"


@pytest.mark.parametrize("name", AUTOFP8)
def test_fp8_states_its_scheme_and_exact_ignored_layers(model_folder: Models, name: str) -> None:
    config = config_of(model_folder("qwen3-moe" if name == "autofp8-dynamic" else "llama"), name)
    assert config["quant_method"] == "fp8"
    assert config["activation_scheme"] == name.removeprefix("autofp8-")
    assert "weight_block_size" not in config
    assert not any(entry.startswith("re:") for entry in config["ignored_layers"])


def test_per_tensor_scales_are_scalars_in_fp8_and_one_element_in_compressed_tensors(model_folder: Models) -> None:
    folder = model_folder("llama")
    for role in ("weight_scale", "input_scale"):
        assert shapes(folder, "autofp8-static", role) == {()}
        assert shapes(folder, "fp8-static", role) == {(1,)}


def test_block_scales_have_the_name_that_readers_of_each_format_expect(model_folder: Models) -> None:
    folder = model_folder("llama", head_dim=64, intermediate_size=384, hidden_size=200)
    for format_name, leaf in (("compressed-tensors", "weight_scale"), ("fp8", "weight_scale_inv")):
        plan = plan_of(folder, recipe("fp8-block", checkpoint_format=format_name))
        scales = {output.name: output.shape for output in plan.outputs if output.role == "weight_scale"}
        assert scales[f"model.layers.0.mlp.down_proj.{leaf}"] == (2, 3)
        assert all(name.rpartition(".")[2] == leaf for name in scales)
    config = config_of(folder, "fp8-block", checkpoint_format="fp8")
    assert config["weight_block_size"] == [128, 128]


def test_channel_scales_are_columns(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama"), recipe())
    height = {output.module: output.shape[0] for output in plan.outputs if output.role == "weight"}
    scales = [output for output in plan.outputs if output.role == "weight_scale"]
    assert scales and all(output.shape == (height[output.module], 1) for output in scales)


def test_kept_experts_are_named_so_that_each_reader_skips_them(model_folder: Models) -> None:
    folder = model_folder("qwen3-moe")
    ignore = config_of(folder, "fp8-dynamic", ignore=["re:.*experts"])["ignore"]
    patterns = [entry[3:] for entry in ignore if entry.startswith("re:")]
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.experts.0.gate_proj"
        assert any(re.match(pattern, name) for pattern in patterns)
    assert not any(re.match(pattern, "model.layers.10.mlp.experts.0.gate_proj") for pattern in patterns)
    layers = config_of(folder, "autofp8-dynamic", ignore=["re:.*experts"])["ignored_layers"]
    assert {f"model.layers.{layer}.mlp.experts" for layer in (0, 1)} <= set(layers)


def test_dynamic_activations_per_tensor_parse_in_compressed_tensors(model_folder: Models) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    dynamic = {"mode": "dynamic", "strategy": "tensor"}
    config = config_of(model_folder("llama"), "fp8-static", activations=dynamic)
    groups: Any = QuantizationConfig.model_validate(config).config_groups
    inputs = groups["group_0"].input_activations
    assert inputs.strategy == "tensor" and inputs.dynamic is True
    assert shapes(model_folder("llama"), "fp8-static", "input_scale", activations=dynamic) == set()


def test_the_tables_in_the_guide_are_those_of_the_code() -> None:
    command = [sys.executable, "-m", "benchmarks.formats", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (ROOT / "docs" / "formats.md").read_text().count("| yes | yes |") >= 5
