"""Mixtures of experts: every expert has a range of its own, and a minimum of tokens behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.calibration import TENSOR_KV, make_model, planned, run_calibration, with_data, write_dataset
from support.whole_model import CLOSE, block_reference, expert_reference, token_ids_of

from fp8pipe.calibrate import calibrate
from fp8pipe.quantize import quantize


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
