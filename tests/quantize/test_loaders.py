"""transformers and vLLM load what the engine writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.numerics import expanded
from support.quantizing import SCHEMES, Models, make, tensors_of
from support.tiny_models import recipe


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("scheme", ["channel", "tensor static", "block"])
def test_transformers_loads_the_checkpoint_within_half_a_step(
    model_folder: Models, tmp_path: Path, scheme: str
) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = model_folder("llama", head_dim=64, intermediate_size=384, hidden_size=256)
    wanted = recipe("fp8-static") if scheme == "tensor static" else recipe(**SCHEMES[scheme])
    plan, _ = make(source, wanted, tmp_path)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        output_loading_info=True,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    scales = tensors_of(tmp_path)
    found = loaded.state_dict()
    for tensor in plan.tensors:
        weight, expected = found[tensor.name].float(), original[tensor.name]
        if tensor.action == "keep":
            assert torch.equal(weight, expected)
            continue
        scale = scales[f"{tensor.name}_scale"]
        if scheme == "block":
            scale = expanded(scale, (128, 128), weight)
        exponent = torch.floor(torch.log2((expected / scale).abs().clamp(min=2**-6)))
        half_step = torch.exp2(exponent) / 16 * scale
        assert bool(((weight - expected).abs() <= half_step * 1.01 + expected.abs() / 250).all())


@pytest.mark.vllm
def test_vllm_has_a_place_for_every_expert_of_a_granite_moe(model_folder: Models, tmp_path: Path) -> None:
    """Its experts are 3-D tensors on disk, beside the module that vLLM makes of them."""
    from fp8pipe.oracle.vllm import ask_vllm

    source = model_folder("granitemoe", hidden_size=256, intermediate_size=128)
    made = {name: tmp_path / name for name in ("fp8-dynamic", "autofp8-dynamic", "fp8-block", "fp8-static")}
    for name, folder in made.items():
        make(source, recipe(name), folder)
    answers = ask_vllm(list(made.values()))
    assert len(answers) == 4
    assert [(answer.refusal, answer.mismatches) for answer in answers.values()] == [("", ())] * 4
