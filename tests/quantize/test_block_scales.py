"""Block scales are powers of two, so that vLLM's own rounding for DeepGEMM leaves every weight as it was validated."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT
from support.quantizing import Models, edit_tensors, make, tensors_of
from support.tiny_models import plan_of, recipe
from torch import Tensor

from fp8pipe.config import Recipe, WeightScheme, validated
from fp8pipe.errors import ConfigError
from fp8pipe.hub.source import resolve
from fp8pipe.quantize.plan import Plan
from fp8pipe.validate import validate

SHAPE = {"head_dim": 64, "intermediate_size": 384, "hidden_size": 200}
"""Whole blocks where vLLM fuses, and ragged ones at the right."""
SMALLEST = 2.0**-22
"""The least scale that vLLM's rounding gives a block: that of its least range, 1e-4."""


@pytest.fixture
def source(model_folder: Models, tmp_path: Path) -> Path:
    """A model whose blocks have ranges of many sizes, with a block of zeros in each down_proj.

    The first block of each weight has a largest code that rounds to 224, half of the largest there is."""
    folder = Path(shutil.copytree(model_folder("llama", shard_size="1GB", **SHAPE), tmp_path / "source"))

    def spread_out(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(5)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = tensors[name].float()
            weight *= torch.exp2(torch.randint(-3, 4, (len(weight), 1), generator=generator))
            weight[:128, :128] *= 225 * 2.0**-10 / weight[:128, :128].abs().max()
            if name.endswith("down_proj.weight"):
                weight[:128, 128:256] = 0
            tensors[name] = weight.bfloat16()

    edit_tensors(folder, spread_out)
    return folder


def vllm_changes(python: str, folder: Path) -> dict[str, float]:
    """Weight -> by how much vLLM's requantization changes it at most."""
    command = [python, ROOT / "tests" / "support" / "vllm_requantizes.py", folder]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.vllm
def test_vllm_requantizes_powers_of_two_to_the_same_weights(source: Path, warm_python: str, tmp_path: Path) -> None:
    for observer in ("minmax", "mse"):
        plan = quantized(source, tmp_path / observer, scales="power_of_two", observer=observer)
        changes = vllm_changes(warm_python, tmp_path / observer)
        assert changes.keys() == {output.name for output in plan.outputs if output.role == "weight"}
        assert not any(changes.values())
    quantized(source, tmp_path / "exact", scales="exact")
    assert all(vllm_changes(warm_python, tmp_path / "exact").values())


@pytest.mark.vllm
def test_in_blocks_below_vllms_least_range_only_tiny_weights_change(
    source: Path, warm_python: str, tmp_path: Path
) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] *= 1e-6 if name.endswith("_proj.weight") else 1

    edit_tensors(source, shrink)
    quantized(source, tmp_path / "out", scales="power_of_two")
    changes = vllm_changes(warm_python, tmp_path / "out")
    assert all(0 < change <= SMALLEST * 2.0**-10 for change in changes.values())


def quantized(source: Path, folder: Path, **weights: Any) -> Plan:
    return make(source, recipe("fp8-block", weights={"strategy": "block"} | weights), folder)[0]


# ---------------------------------------------------------------------------------------------- recipes and plans


def test_powers_of_two_are_the_default_for_blocks_alone() -> None:
    assert WeightScheme(strategy="block").scales == "power_of_two" == recipe("fp8-block").weights.scales
    assert WeightScheme(strategy="block", scales="exact").scales == "exact"
    for strategy in ("tensor", "channel"):
        assert WeightScheme(strategy=strategy).scales == "exact"
        content = {"name": "x", "weights": {"strategy": strategy, "scales": "power_of_two"}}
        with pytest.raises(ConfigError, match="power_of_two goes with strategy: block"):
            validated(Recipe, content, "x.yaml")


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_config_declares_them_and_the_plan_says_so(model_folder: Models, method: str) -> None:
    folder = model_folder("llama", **SHAPE)
    for scales, declared, words in (("power_of_two", "ue8m0", "one power-of-two scale"), ("exact", None, "one scale")):
        weights = {"strategy": "block", "scales": scales}
        plan = plan_of(folder, recipe("fp8-block", checkpoint_format=method, weights=weights))
        assert plan.quantization_config.get("scale_fmt") == declared
        reasons = {tensor.reason for tensor in plan.tensors if tensor.action == "quantize"}
        assert reasons == {f"Linear weight, E4M3 with {words} per block of 128x128"}


def test_a_recipe_recorded_before_the_option_had_exact_scales(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama", **SHAPE), recipe("fp8-block"))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    old = json.loads(plan.model_dump_json())
    del old["settings"]["weights"]["scales"]
    assert Plan.model_validate_json(json.dumps(old)).settings.weights.scales == "exact"


# ---------------------------------------------------------------------------------------------- loaders


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_transformers_reads_the_declared_scales_of_the_fp8_spelling(model_folder: Models, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    whole = model_folder("llama", head_dim=64, intermediate_size=384, hidden_size=256)
    plan, _ = make(whole, recipe("fp8-block", checkpoint_format="fp8"), tmp_path / "out")
    config = FineGrainedFP8Config(**plan.quantization_config | {"dequantize": True})
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, quantization_config=config
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    made, found = tensors_of(tmp_path / "out"), loaded.state_dict()
    for output in (output for output in plan.outputs if output.role == "weight"):
        scale = made[f"{output.name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(found[output.name], made[output.name].float() * scale[: output.shape[0], : output.shape[1]])


# ---------------------------------------------------------------------------------------------- validating


@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("with_records", [True, False], ids=["records", "no records"])
@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_the_validator_finds_nothing_in_them(
    source: Path, tmp_path: Path, method: str, with_records: bool, observer: str
) -> None:
    weights = {"strategy": "block", "observer": observer}
    make(source, recipe("fp8-block", checkpoint_format=method, weights=weights), tmp_path / "out")
    if not with_records:
        shutil.rmtree(tmp_path / "out" / "fp8pipe")
    report = validate(tmp_path / "out", source=resolve(str(source)))
    found = {finding.check for finding in report.findings if finding.check[0] in "CKSVD"}
    assert not found, [finding.sentence() for finding in report.findings]


@pytest.mark.parametrize("with_records", [True, False], ids=["records", "no records"])
@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_a_scale_that_is_no_power_of_two_is_an_error(
    source: Path, tmp_path: Path, method: str, with_records: bool
) -> None:
    make(source, recipe("fp8-block", checkpoint_format=method), tmp_path / "out")
    if not with_records:
        shutil.rmtree(tmp_path / "out" / "fp8pipe")
    scale = f"model.layers.1.mlp.up_proj.weight_scale{'_inv' if method == 'fp8' else ''}"

    def off(tensors: dict[str, Tensor]) -> None:
        tensors[scale][2, 1] *= 1.25

    edit_tensors(tmp_path / "out", off)
    (finding,) = [finding for finding in validate(tmp_path / "out").errors if finding.check == "V2"]
    assert finding.tensor == scale
    assert "powers of two" in finding.sentence() and "1 of 6 are not" in finding.sentence()
    assert "at [2, 1]" in finding.sentence()


def test_a_recipe_of_powers_of_two_holds_even_if_config_json_forgets_it(source: Path, tmp_path: Path) -> None:
    plan = quantized(source, tmp_path / "out", scales="exact")
    assert not validate(tmp_path / "out").errors
    settings = plan.settings.model_copy(update={"weights": WeightScheme(strategy="block")})
    plan.model_copy(update={"settings": settings}).save(tmp_path / "out" / "fp8pipe" / "plan.json")
    assert "V2" in {finding.check for finding in validate(tmp_path / "out").errors}
