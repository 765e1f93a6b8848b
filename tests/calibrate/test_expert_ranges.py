"""Mixtures of experts: every expert has a range of its own, and a minimum of tokens behind it.

An expert without a range that can be measured gets one that changes nothing for the others, and the record says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.calibration import TENSOR_KV, make_model, planned, run_calibration, with_data, write_dataset
from support.whole_model import CLOSE, block_reference, expert_reference, token_ids_of
from torch import nn

from fp8pipe.calibrate import calibrate
from fp8pipe.calibrate.ranges import input_ranges
from fp8pipe.calibrate.sensitivity.sampling import Seen
from fp8pipe.calibrate.targets import LayerModules
from fp8pipe.config import load_recipe
from fp8pipe.errors import UnsupportedArchitecture
from fp8pipe.quantize import quantize
from fp8pipe.validate import validate


def test_an_expert_with_few_tokens_is_topped_up_to_the_minimum_and_counted(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mixtral")
    gate = model.get_submodule("model.layers.0.mlp.gate")
    with torch.no_grad():
        gate.weight[3] = 0  # a logit of 0 is rarely among the two best beside three random ones
        gate.weight[2] = -gate.weight[1] * 0.5
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    recipe = with_data(TENSOR_KV, write_dataset(tmp_path / "data.jsonl"), min_expert_tokens=70)
    found = run_calibration(tmp_path / "model", recipe, tmp_path / "out")

    counts = {name: seen for name, seen in found.expert_tokens.items() if name.startswith("model.layers.0.")}
    assert len(counts) == 4
    assert sum(seen.routed for seen in counts.values()) == 2 * found.tokens
    assert all(seen.added == 0 for seen in counts.values() if seen.routed >= 70)
    rare = [seen for seen in counts.values() if seen.routed < 70]
    assert rare
    assert all(seen.routed + seen.added == 70 for seen in rare)


@pytest.mark.parametrize("name", ["llama4", "granitemoe"])
def test_experts_in_one_tensor_on_disk_get_a_scale_each(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", name)
    recipe = with_data(TENSOR_KV, write_dataset(tmp_path / "data.jsonl"), min_expert_tokens=0)
    snapshot, plan, architecture = planned(tmp_path / "model", recipe)
    assert any(role.kind == "fused_experts" for role in architecture.tensors.values())
    found = calibrate(snapshot, plan, recipe, tmp_path / "out", architecture=architecture)
    reference = (block_reference if name == "llama4" else expert_reference)(model, token_ids_of(found))
    of_experts = {module: amax for module, amax in found.inputs.items() if module.split(".")[-2].isdecimal()}
    assert len(of_experts) == 3 * len(reference) > 0
    for module, amax in of_experts.items():
        holder, expert, projection = module.rsplit(".", 2)
        layer = f".{holder.split('.')[2]}."
        ((_, (up, down)),) = [item for item in reference.items() if layer in item[0][0] and item[0][1] == int(expert)]
        assert amax == pytest.approx(down if projection == "down_proj" else up, rel=CLOSE)
    made = quantize(snapshot, plan, tmp_path / "checkpoint", calibration=found)
    assert made.quantized_tensors > 0


HOLDER = "model.layers.1.block_sparse_moe.experts"


def mixtral_with_dead_experts(folder: Path, dead: Sequence[int]) -> Path:
    """A Mixtral in whose second layer some experts put out zeros, whatever their input."""
    model = make_model(folder, "mixtral")
    with torch.no_grad():
        for expert in dead:
            model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[expert] = 0
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.mark.parametrize("dead", [(1,), (0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("name", ["fp8-static-kv", "autofp8-static"])
def test_an_expert_whose_input_is_always_zero_ends_in_a_sound_checkpoint(
    tmp_path: Path, dead: tuple[int, ...], name: str
) -> None:
    source = mixtral_with_dead_experts(tmp_path / "model", dead)
    recipe = with_data(load_recipe(name), write_dataset(tmp_path / "data.jsonl"), num_samples=5, max_seq_len=64)
    snapshot, plan, architecture = planned(source, recipe)
    found = calibrate(snapshot, plan, recipe, tmp_path / "out", architecture=architecture)
    ranges = [found.inputs[f"{HOLDER}.{expert}.w2"] for expert in range(4)]
    alive = [ranges[expert] for expert in range(4) if expert not in dead]
    assert {ranges[expert] for expert in dead} == {max(alive, default=448.0)}  # vLLM takes the largest for all
    assert found.assumed.keys() == {f"{HOLDER}.{expert}.w2.input_scale" for expert in dead}
    assert all(reason.startswith("every input of this expert was 0") for reason in found.assumed.values())
    quantize(snapshot, plan, tmp_path / "fp8", calibration=found)
    for report in (validate(tmp_path / "fp8", source=snapshot, architecture=architecture), validate(tmp_path / "fp8")):
        assert {finding.check for finding in report.findings} <= {"C8", "C9", "K10"}, report.findings


def test_an_expert_that_sees_no_token_gets_the_largest_range_of_the_others(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "deepseek_v3")
    model.get_buffer("model.layers.2.mlp.gate.e_score_correction_bias")[3] = -100
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    recipe = with_data(TENSOR_KV, write_dataset(tmp_path / "data.jsonl"), min_expert_tokens=0)
    found = run_calibration(tmp_path / "model", recipe, tmp_path / "out")
    holder = "model.layers.2.mlp.experts"
    assert found.expert_tokens[f"{holder}.3"].routed == 0
    for projection in ("gate_proj", "up_proj", "down_proj"):
        *others, unseen = (found.inputs[f"{holder}.{expert}.{projection}"] for expert in range(4))
        assert unseen == max(others)
        assert found.assumed[f"{holder}.3.{projection}.input_scale"].startswith("this expert saw no token")
    assert len(found.assumed) == 3


def test_experts_for_images_are_shown_tokens_of_their_layer(tmp_path: Path) -> None:
    """Texts reach only one of Ernie's two experts modules, whose experts the files number in one row."""
    model = make_model(tmp_path / "model", "ernie_vl")
    recipe = with_data(TENSOR_KV, write_dataset(tmp_path / "data.jsonl"), min_expert_tokens=16)
    found = run_calibration(tmp_path / "model", recipe, tmp_path / "out")
    reference = expert_reference(model, token_ids_of(found))
    for (module, expert), (up, down) in reference.items():
        name = f"model.layers.{module.split('.')[3]}.mlp.experts.{expert}"
        if found.expert_tokens[name].added == 0:
            assert found.inputs[f"{name}.up_proj"] == pytest.approx(up, rel=CLOSE)
            assert found.inputs[f"{name}.down_proj"] == pytest.approx(down, rel=CLOSE)
    seen = {name: tokens for name, tokens in found.expert_tokens.items() if int(name.rpartition(".")[2]) > 3}
    assert len(seen) == 8
    assert all((tokens.routed, tokens.added) == (0, 16) for tokens in seen.values())
    assert all(found.inputs[f"{name}.down_proj"] > 0 for name in seen)
    assert not found.assumed

    none = with_data(TENSOR_KV, tmp_path / "data.jsonl", min_expert_tokens=0)
    with pytest.raises(UnsupportedArchitecture, match="min_expert_tokens: 1 or more"):
        run_calibration(tmp_path / "model", none, tmp_path / "none")


def test_linears_in_a_list_of_experts_that_see_nothing_get_the_range_of_the_others() -> None:
    """A model's own code may run its experts one by one."""
    names = [f"layers.0.mlp.experts.{expert}.w1" for expert in range(3)]
    layer = LayerModules("layers.0", dict.fromkeys([*names, "layers.0.mlp.shared.w1"], nn.Linear(1, 1)))
    seen = {(names[0],): Seen(None, 3.0, 2.0, 0.0), (names[2],): Seen(None, 0.0, 0.0, 0.0)}
    ranges, assumed = input_ranges(seen, layer)
    assert ranges == dict.fromkeys(names, 2.0)
    assert set(assumed) == {f"{name}.input_scale" for name in names[1:]}
