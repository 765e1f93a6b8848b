"""Ranges equal those of a reference that holds the whole model, and llm-compressor's scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import DATA
from support.calibration import (
    ARCHITECTURES,
    MOE_NAMES,
    PEER_RECIPE,
    STATIC_KV,
    TENSOR_KV,
    calibrated,
    make_model,
    planned,
    run_calibration,
    with_data,
    write_dataset,
)
from support.whole_model import CLOSE, cache_reference, expert_reference, linear_reference, token_ids_of

from fp8pipe.calibrate import calibrate
from fp8pipe.errors import InputError


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ranges_equal_a_reference_that_holds_the_whole_model(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", name)
    recipe = TENSOR_KV if name in MOE_NAMES else STATIC_KV
    data = write_dataset(tmp_path / "data.jsonl")
    found = run_calibration(tmp_path / "model", with_data(recipe, data, min_expert_tokens=0), tmp_path / "out")

    token_ids = token_ids_of(found)
    expected = linear_reference(model, token_ids)
    linears = [module for module in found.inputs if module in expected]
    assert {module: found.inputs[module] for module in linears} == pytest.approx(
        {module: expected[module] for module in linears}, rel=CLOSE
    )
    of_experts = {(*module.split(".experts."), amax) for module, amax in found.inputs.items() if module not in expected}
    routed = expert_reference(model, token_ids)
    for parent, rest, amax in of_experts:
        expert, projection = rest.split(".")
        holder = next(holder for holder, _ in routed if holder.split(".")[2] == parent.split(".")[2])
        up, down = routed[holder, int(expert)]
        assert amax == pytest.approx(down if projection in {"down_proj", "w2"} else up, rel=CLOSE)
    assert len(linears) + len(of_experts) == len(found.inputs) > 0

    if name.startswith("deepseek"):
        assert not found.kv
        return
    reference = cache_reference(model, token_ids)
    assert len(found.kv) == len(reference)
    for layer, (keys, values) in enumerate(reference):
        (name,) = [name for name in found.kv if f".layers.{layer}." in name]
        ranges = found.kv[name]
        assert ranges.k_amax == pytest.approx(keys.tolist(), rel=CLOSE)
        assert ranges.v_amax == pytest.approx(values.tolist(), rel=CLOSE)


PEER_SCALES = DATA / "peer_scales"
"""Scales of llm-compressor's oneshot for the same models and samples, written by
`python -m benchmarks.calibrate --compare-scales --fixtures tests/data/peer_scales`."""


@pytest.mark.parametrize("path", sorted(PEER_SCALES.glob("*.json")), ids=lambda path: path.stem)
def test_scales_equal_llm_compressors_within_half_a_step_of_bf16(path: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model", path.stem)
    found = calibrated(tmp_path, PEER_RECIPE)
    scales = {f"{name}.input_scale": amax / 448 for name, amax in found.inputs.items()}
    for name, ranges in found.kv.items():
        scales |= {f"{name}.k_scale": ranges.k_amax[0] / 448, f"{name}.v_scale": ranges.v_amax[0] / 448}
    theirs = json.loads(path.read_text())
    assert len(theirs) > 20
    assert {name: scales[name] for name in theirs} == pytest.approx(theirs, rel=2**-8)


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-model"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_remote_code_is_calibrated_only_when_trusted(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_model(model, "llama")
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    expected = run_calibration(model, recipe, tmp_path / "expected")
    (model / "own.py").write_text(CUSTOM)
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own-model", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(config))
    snapshot, plan, architecture = planned(model, recipe, trust_remote_code=True)
    assert plan.trust_remote_code
    found = calibrate(snapshot, plan, recipe, tmp_path / "out", architecture=architecture)
    assert found.inputs == expected.inputs
    untrusted = plan.model_copy(update={"trust_remote_code": False})
    with pytest.raises(InputError, match="trust"):
        calibrate(snapshot, untrusted, recipe, tmp_path / "other", architecture=architecture)


def test_scaled_multiplies_every_range(llama: Path, tmp_path: Path) -> None:
    found = run_calibration(llama, with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl")), tmp_path / "out")
    tenth = found.scaled(0.1)
    assert tenth.inputs == pytest.approx({name: amax / 10 for name, amax in found.inputs.items()})
    assert all(tenth.kv[name].k_amax == pytest.approx([k / 10 for k in kv.k_amax]) for name, kv in found.kv.items())
    assert tenth.digest() != found.digest()
