"""The other spelling holds the same bytes, states the same scheme, and can be converted back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference_checkpoints as reference
from support.conversions import Models, Tensors, config_of, edit, everything, same, to, weights_of
from support.quantizing import tensors_of
from support.tiny_models import calibration_for, plan_of, recipe

from fp8pipe.hub.source import resolve
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import Plan
from fp8pipe.validate import validate

SCHEMES: dict[str, dict[str, Any]] = {
    "tensor static with KV": {"kv": "tensor"},
    "tensor static": {},
    "tensor dynamic": {"static": False},
    "block": {"strategy": "block", "static": False},
    "one file": {"shards": 1},
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("first", ["compressed-tensors", "fp8"])
def test_there_and_back_is_the_original_byte_for_byte(llama: Path, tmp_path: Path, scheme: str, first: Any) -> None:
    other = {"compressed-tensors": "fp8", "fp8": "compressed-tensors"}[first]
    source = reference.quantize(llama, tmp_path / "source", method=first, **SCHEMES[scheme])
    before = everything(source)
    to(other, source, tmp_path / "there")
    to(first, tmp_path / "there", tmp_path / "back")
    there, back = tensors_of(tmp_path / "there"), tensors_of(tmp_path / "back")
    assert same(tensors_of(source), back) or first == "fp8"  # the reference writes [1] in both spellings
    for name, tensor in tensors_of(source).items():
        renamed = name.replace("weight_scale_inv", "weight_scale") if other != "fp8" else name
        renamed = f"{name}_inv" if other == "fp8" and scheme == "block" and name.endswith("weight_scale") else renamed
        assert torch.equal(there[renamed].float().reshape(-1), tensor.float().reshape(-1))
        assert torch.equal(back[name].float().reshape(-1), tensor.float().reshape(-1))
    assert everything(source) == before
    if first == "compressed-tensors":
        assert weights_of(tmp_path / "back") == weights_of(source)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("first", ["compressed-tensors", "fp8"])
def test_the_result_is_sound_and_its_readers_parse_its_config(
    llama: Path, tmp_path: Path, scheme: str, first: Any
) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import FineGrainedFP8Config

    other = {"compressed-tensors": "fp8", "fp8": "compressed-tensors"}[first]
    source = reference.quantize(llama, tmp_path / "source", method=first, **SCHEMES[scheme])
    to(other, source, tmp_path / "out")
    snapshot = resolve(str(llama))
    assert [finding.sentence() for finding in validate(tmp_path / "out", source=snapshot).errors] == []
    config = config_of(tmp_path / "out")
    if other == "fp8":
        parsed: Any = FineGrainedFP8Config.from_dict(dict(config))
        assert parsed.modules_to_not_convert == ["lm_head"]
    else:
        groups: Any = QuantizationConfig.model_validate(config).config_groups
        (group,) = groups.values()
        assert group.weights is not None and group.input_activations is not None
        assert group.targets == ["Linear"]
        assert bool(group.input_activations.dynamic) == (SCHEMES[scheme].get("static") is False)


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_scales_in_bf16_become_the_same_numbers_in_float32(llama: Path, tmp_path: Path, method: Any) -> None:
    other = {"compressed-tensors": "fp8", "fp8": "compressed-tensors"}[method]
    source = reference.quantize(llama, tmp_path / "source", method=method, scale_dtype=torch.bfloat16)
    done = to(other, source, tmp_path / "out")
    theirs, ours = tensors_of(source), tensors_of(tmp_path / "out")
    scales = [name for name in ours if name.endswith("weight_scale")]
    assert len(scales) == 14
    for name in scales:
        assert ours[name].dtype == torch.float32 and theirs[name].dtype == torch.bfloat16
        assert ours[name].item() == theirs[name].float().item()
    assert any("weight_scale BF16 [1] -> weight_scale F32" in change.what for change in done.changes) or method == "fp8"


def test_float16_scales_widen_exactly(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", scale_dtype=torch.float16)
    to("fp8", source, tmp_path / "out")
    theirs, ours = tensors_of(source), tensors_of(tmp_path / "out")
    assert all(ours[n].item() == theirs[n].float().item() for n in ours if n.endswith("weight_scale"))


@pytest.mark.parametrize("model", ["llama", "qwen3-moe", "mixtral"])
@pytest.mark.parametrize("name", ["fp8-static-kv", "fp8-block", "fp8-static"])
def test_the_result_equals_what_quantize_writes_in_that_spelling(
    model_folder: Models, tmp_path: Path, model: str, name: str
) -> None:
    source = model_folder(model, head_dim=64, hidden_size=256, intermediate_size=384)
    changes = {"ignore": ["re:.*layers\\.0\\..*experts"]} if model == "qwen3-moe" and name != "fp8-block" else {}
    for method in ("compressed-tensors", "fp8"):
        wanted = recipe(name, checkpoint_format=method, **changes)
        plan = plan_of(source, wanted)
        quantize(resolve(str(source)), plan, tmp_path / method, calibration=calibrated(plan))
    for method, other in (("compressed-tensors", "fp8"), ("fp8", "compressed-tensors")):
        to(other, tmp_path / method, tmp_path / f"made {other}")
        assert weights_of(tmp_path / f"made {other}") == weights_of(tmp_path / other)
        for file in (path.name for path in (tmp_path / other).iterdir() if path.is_file()):
            assert (tmp_path / f"made {other}" / file).read_bytes() == (tmp_path / other / file).read_bytes()


def calibrated(plan: Plan) -> Any:
    return calibration_for(plan) if plan.settings.needs_calibration else None


def test_kept_modules_are_named_exactly_and_experts_by_layer(moe: Path, tmp_path: Path) -> None:
    source = reference.quantize(moe, tmp_path / "source")
    assert "re:.*mlp\\.gate$" in config_of(source)["ignore"]
    to("fp8", source, tmp_path / "fp8")
    routers = [f"model.layers.{layer}.mlp.gate" for layer in (0, 1)]
    # the reference checkpoint quantizes attention and experts
    assert config_of(tmp_path / "fp8")["ignored_layers"] == ["lm_head", *routers]
    to("compressed-tensors", tmp_path / "fp8", tmp_path / "back")
    assert config_of(tmp_path / "back")["ignore"] == ["lm_head", *routers]
    assert same(tensors_of(source), tensors_of(tmp_path / "back"))


def test_unquantized_experts_are_ignored_under_the_name_each_reader_expects(moe: Path, tmp_path: Path) -> None:
    original = tensors_of(moe)

    def keep_experts(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            if name.endswith("_scale"):
                del tensors[name]
            else:
                tensors[name] = original[name]
        config["ignore"] = ["lm_head", "re:.*mlp\\..*"]

    source = edit(reference.quantize(moe, tmp_path / "source"), keep_experts)
    to("fp8", source, tmp_path / "fp8")
    holders = [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    assert config_of(tmp_path / "fp8")["ignored_layers"][-2:] == holders
    to("compressed-tensors", tmp_path / "fp8", tmp_path / "back")
    assert config_of(tmp_path / "back")["ignore"][-2:] == [f"re:.*layers\\.{n}\\.mlp\\.experts\\..*" for n in (0, 1)]
    for folder in ("fp8", "back"):
        assert validate(tmp_path / folder, source=resolve(str(moe))).errors == ()
