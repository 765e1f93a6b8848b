"""What the other spelling cannot express is refused with the reason; what readers do differently is a note."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference_checkpoints as reference
from support.conversions import AT, Tensors, config_of, edit, rename, to
from support.findings import ids

from fp8pipe.errors import InputError
from fp8pipe.validate import validate

Change = Callable[[Tensors, dict[str, Any]], None]


def group(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]


def two_groups(_: Tensors, config: dict[str, Any]) -> None:
    other = json.loads(json.dumps(group(config))) | {"targets": [f"re:{AT}"]}
    other["input_activations"] |= {"dynamic": True}
    config["config_groups"] = {"group_1": other, "group_0": group(config)}


def head_in_fp8(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    tensors |= {"lm_head.weight_scale": torch.ones(1), "lm_head.input_scale": torch.ones(1)}
    config["ignore"] = []
    group(config)["targets"] = ["Linear", "re:.*lm_head"]


def drop(name: str) -> Change:
    return lambda tensors, _: tensors.__delitem__(name) or None


def put(name: str, value: torch.Tensor) -> Change:
    return lambda tensors, _: tensors.update({name: value})


def set_in_group(**values: Any) -> Change:
    return lambda _, config: group(config).update(values)


def static_per_token(_: Tensors, config: dict[str, Any]) -> None:
    group(config)["input_activations"] |= {"strategy": "token"}


REFUSED: dict[str, tuple[dict[str, Any], Change | None, str]] = {
    "channel weights": ({"strategy": "channel", "static": False}, None, "a scale per output channel"),
    "weight-only": ({"static": False}, set_in_group(input_activations=None), "only weights are FP8"),
    "KV per head": ({"kv": "attn_head"}, None, "KV cache has a scale per head"),
    "static per token": ({}, static_per_token, "expected static inputs per tensor, found token"),
    "several schemes": ({}, two_groups, "several schemes in one model"),
    "FP8 lm_head": ({}, head_in_fp8, "lm_head is FP8"),
    "FP8 outputs": ({}, set_in_group(output_activations={"num_bits": 8}), "output_activations has no counterpart"),
    "transforms": ({}, lambda _, c: c.update(transform_config={"R1": {}}), "transform_config has no counterpart"),
    "sparsity": ({}, lambda _, c: c.update(sparsity_config={"targets": ["Linear"]}), "sparsity_config has no"),
    "ignored yet FP8": ({}, lambda _, c: c.update(ignore=[AT]), f"{AT}.weight is FP8, but config.json"),
    "no scale": ({}, drop(f"{AT}.weight_scale"), f"{AT}.weight is FP8 and has no weight_scale"),
    "no input scale": ({}, drop(f"{AT}.input_scale"), f"{AT}.weight is FP8 and has no input_scale"),
    "input scale of a dynamic scheme": ({"static": False}, put(f"{AT}.input_scale", torch.ones(1)), "has no place"),
    "scale of another shape": ({}, put(f"{AT}.weight_scale", torch.ones(160, 1)), r"weight_scale \[160, 1\] has no"),
    "zero point": ({}, put(f"{AT}.weight_zero_point", torch.ones(1)), "weight_zero_point .* has no place"),
    "double scale": ({}, put(f"{AT}.weight_scale", torch.ones(1).double()), "a scale in F64"),
    "E5M2": ({}, put(f"{AT}.weight", torch.zeros(160, 64).to(torch.float8_e5m2)), "F8_E5M2"),
    "experts in one tensor": (
        {},
        put("model.layers.1.mlp.experts.down_proj", torch.zeros(2, 8, 8).to(torch.float8_e4m3fn)),
        r"experts\.down_proj: F8_E4M3",
    ),
    "k_scale without v_scale": ({}, put("model.layers.0.self_attn.k_scale", torch.ones(1)), "k_scale has no v_scale"),
    "another method": ({}, lambda _, c: c.update(quant_method="gptq"), "quant_method 'gptq'; only"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_fp8_cannot_express_is_refused_with_the_reason(llama: Path, tmp_path: Path, case: str) -> None:
    options, change, reason = REFUSED[case]
    source = reference.quantize(llama, tmp_path / "source", **options)
    if change is not None:
        edit(source, change)
    with pytest.raises(InputError, match=reason):
        to("fp8", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unquantized_model_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no quantization_config"):
        to("fp8", llama, tmp_path / "out")


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_half_quantized_experts_are_refused(moe: Path, tmp_path: Path, method: Any) -> None:
    name = "model.layers.0.mlp.experts.2.up_proj"

    def keep_one(tensors: Tensors, config: dict[str, Any]) -> None:
        for leaf in ("weight_scale", "input_scale"):
            del tensors[f"{name}.{leaf}"]
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].bfloat16()
        config["ignore" if method != "fp8" else "ignored_layers"].append(name)

    source = edit(reference.quantize(moe, tmp_path / "source", method=method), keep_one)
    with pytest.raises(InputError, match=r"some experts are FP8 .* others are not"):
        to({"compressed-tensors": "fp8", "fp8": "compressed-tensors"}[method], source, tmp_path / "out")


def test_experts_that_compressed_tensors_has_no_kernel_for_stay_fp8(moe: Path, tmp_path: Path) -> None:
    source = reference.quantize(moe, tmp_path / "source", method="fp8", static=False)
    with pytest.raises(InputError, match=r"vLLM serves experts with .* not tensor weights with dynamic activations"):
        to("compressed-tensors", source, tmp_path / "out")


OTHER = {"compressed-tensors": "fp8", "fp8": "compressed-tensors"}


@pytest.mark.parametrize("method", OTHER)
@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"intermediate": 176}, r"mlp\.\(gate_proj\+up_proj\): 176 rows fused with others are not whole blocks of 32"),
        ({"kv_heads": 1}, r"self_attn\.\(q_proj\+k_proj\+v_proj\): 16 rows fused with others"),
    ],
)
def test_blocks_that_vllm_cannot_cut_are_refused_in_both_directions(
    tmp_path: Path, method: Any, sizes: Any, reason: str
) -> None:
    model = reference.llama(tmp_path / "model", **sizes)
    source = reference.quantize(model, tmp_path / "source", method=method, strategy="block", static=False)
    assert "S5" in ids(validate(source, oracles=False))
    with pytest.raises(InputError, match=reason):
        to(OTHER[method], source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fused_tensors_and_experts_that_blocks_do_not_fit_are_refused(llama: Path, moe: Path, tmp_path: Path) -> None:
    def fuse(tensors: Tensors, _: dict[str, Any]) -> None:
        for layer in range(2):
            at = f"model.layers.{layer}.mlp"
            for leaf, rows in (("weight", 352), ("weight_scale_inv", 11)):
                both = [tensors.pop(f"{at}.{name}.{leaf}") for name in ("gate_proj", "up_proj")]
                tensors[f"{at}.gate_up_proj.{leaf}"] = torch.cat(both)[:rows]

    def narrow(tensors: Tensors, _: dict[str, Any]) -> None:
        for name, value in tensors.items():
            if ".experts." in name and name.endswith("weight"):
                tensors[name] = (value[:, :24] if "down_proj" in name else value[:24]).contiguous()

    how: dict[str, Any] = {"method": "fp8", "strategy": "block", "static": False}
    wide = reference.llama(tmp_path / "wide", intermediate=176)
    fused = edit(reference.quantize(wide, tmp_path / "fused", **how), fuse)
    with pytest.raises(InputError, match=r"gate_up_proj: 176 rows fused with others are not whole blocks"):
        to("compressed-tensors", fused, tmp_path / "out")
    experts = edit(reference.quantize(moe, tmp_path / "experts", **how), narrow)
    with pytest.raises(InputError, match=r"experts: 24 wide per GPU are not whole blocks of 32x32"):
        to("compressed-tensors", experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_absorbed_mla_projection_with_a_static_scale_stays_fp8(llama: Path, tmp_path: Path) -> None:
    def as_mla(tensors: Tensors, _: dict[str, Any]) -> None:
        for leaf in ("weight", "weight_scale", "input_scale"):
            rename(tensors, f".k_proj.{leaf}", f".kv_b_proj.{leaf}")

    source = edit(reference.quantize(llama, tmp_path / "source", method="fp8"), as_mla)
    with pytest.raises(InputError, match="kv_b_proj has a static input scale"):
        to("compressed-tensors", source, tmp_path / "out")


def test_notes_name_what_readers_do_differently(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", kv="tensor")
    notes = " ".join(to("fp8", source, tmp_path / "fp8").notes)
    assert "--kv-cache-dtype fp8" in notes and "for vLLM only" in notes
    (note,) = to("compressed-tensors", tmp_path / "fp8", tmp_path / "back").notes
    assert "keep the KV cache in FP8" in note

    def deepseek(_: Tensors, config: dict[str, Any]) -> None:
        config |= {"scale_fmt": "ue8m0", "fmt": "e4m3"}
        del config["ignored_layers"]

    block = reference.quantize(llama, tmp_path / "block", method="fp8", strategy="block", static=False)
    (note,) = to("compressed-tensors", edit(block, deepseek), tmp_path / "out").notes
    assert "ue8m0" in note and config_of(tmp_path / "out")["ignore"] == ["lm_head"]
