"""The scheme is read as vLLM reads it, and what other tools write by it is not blamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference_checkpoints as reference
from support.findings import ids
from support.malformed import K_PROJ, O_PROJ, Q_PROJ, V_PROJ, edit_quantization, edit_tensors

from fp8pipe.hub.source import resolve
from fp8pipe.validate import validate
from fp8pipe.validate.meaning.config import read_scheme

pytestmark = pytest.mark.usefixtures("architecture_cache")

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.llama(tmp_path_factory.mktemp("dense") / "source")


def problems(folder: Path, source: Path) -> tuple[set[str], list[str]]:
    report = validate(folder, source=resolve(str(source)))
    return ids(report), [finding.sentence() for finding in report.findings]


# ---------------------------------------------------------------------------------------------- groups


BLOCK = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": list(reference.BLOCK)}
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}


def group(target: str, weights: dict[str, Any]) -> dict[str, Any]:
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    return {"targets": [target], "weights": weights, "input_activations": inputs}


def test_target_that_names_a_module_counts_before_one_that_names_its_class(dense: Path, tmp_path: Path) -> None:
    """vLLM's find_matched_target: all names first, in the order of the groups, then classes."""
    folder = reference.quantize(dense, tmp_path / "fp8", strategy="channel", static=False)
    blocks = reference.quantize(dense, tmp_path / "blocks", strategy="block", static=False)
    theirs = reference.read(blocks)[0]

    def take_blocks(tensors: Tensors) -> None:
        tensors.update({name: theirs[name] for name in tensors if ".down_proj." in name})

    edit_tensors(folder, take_blocks)
    groups = {"group_0": group("Linear", CHANNEL), "group_1": group(r"re:.*down_proj$", BLOCK)}
    edit_quantization(folder, lambda quant: quant.update(config_groups=groups))
    found, reported = problems(folder, dense)
    assert not found, reported


def test_target_of_two_groups_is_the_last_one_s() -> None:
    groups = {"a": group("Linear", CHANNEL), "b": group(f"re:{Q_PROJ}$", CHANNEL), "c": group("Linear", BLOCK)}
    scheme = read_scheme({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups})
    assert scheme is not None
    strategies = [spec.strategy for name in (Q_PROJ, O_PROJ) if (spec := scheme.spec_of(name)) is not None]
    assert strategies == ["channel", "block"]


# ---------------------------------------------------------------------------------------------- fused names


def keep_qkv(folder: Path, source: Path) -> None:
    """q, k and v of the first layer as they were."""
    whole = reference.read(source)[0]

    def keep(tensors: Tensors) -> None:
        for module in (Q_PROJ, K_PROJ, V_PROJ):
            for name in [name for name in tensors if name.startswith(f"{module}.")]:
                del tensors[name]
            tensors[f"{module}.weight"] = whole[f"{module}.weight"]

    edit_tensors(folder, keep)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"method": "fp8", "strategy": "block"}, "modules_to_not_convert"),
        ({"strategy": "channel"}, "ignore"),
    ],
    ids=["fp8", "compressed-tensors"],
)
def test_ignore_list_may_hold_vllm_s_name_of_a_fused_layer(
    dense: Path, tmp_path: Path, arguments: dict[str, Any], key: str
) -> None:
    """As in the block-FP8 Step-3.5-Flash."""
    folder = reference.quantize(dense, tmp_path / "fp8", static=False, **arguments)
    keep_qkv(folder, dense)
    assert "K5" in problems(folder, dense)[0]
    name = f"{Q_PROJ.removesuffix('q_proj')}qkv_proj"
    edit_quantization(folder, lambda quant: quant.update({key: [*quant.pop("ignored_layers", ["lm_head"]), name]}))
    found, reported = problems(folder, dense)
    assert found <= {"K10"}, reported


def test_fused_name_among_experts_is_no_layer_of_vllm_s() -> None:
    groups = {"a": group("Linear", CHANNEL)}
    quant = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["m.experts.0.gate_up_proj"]}
    scheme = read_scheme(quant)
    assert scheme is not None and not scheme.ignores("m.experts.0.gate_proj")


# ---------------------------------------------------------------------------------------------- scales (D6)


def test_zero_rows_may_have_any_scale(tmp_path: Path) -> None:
    """compressed-tensors writes the epsilon of the scale's dtype, in bf16 0.0078, where absmax is zero."""
    source = reference.llama(tmp_path / "source")

    def blank(tensors: Tensors) -> None:
        tensors[f"{O_PROJ}.weight"][[3, 40]] = 0

    edit_tensors(source, blank)
    folder = reference.quantize(source, tmp_path / "fp8", strategy="channel", static=False)

    def epsilon(tensors: Tensors) -> None:
        tensors[f"{O_PROJ}.weight_scale"][[3, 40]] = torch.finfo(torch.bfloat16).eps

    edit_tensors(folder, epsilon)
    found, reported = problems(folder, source)
    assert not found, reported

    def off(tensors: Tensors) -> None:
        tensors[f"{O_PROJ}.weight_scale"][5] *= 1.0001

    edit_tensors(folder, off)
    assert "D6" in problems(folder, source)[0]


def by_powers_of_two(folder: Path, source: Path, *, factor: float = 1) -> None:
    """Blocks under the least power of two that reaches their largest weight, times `factor`."""
    whole, (high, wide) = reference.read(source)[0], reference.BLOCK

    def again(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale_inv")]:
            weight = whole[name.removesuffix("_scale_inv")].float()
            scale = torch.exp2(torch.ceil(torch.log2(tensors[name]))) * factor
            spread = scale.repeat_interleave(high, 0)[: len(weight)].repeat_interleave(wide, 1)[:, : weight.shape[1]]
            tensors[name] = scale
            tensors[name.removesuffix("_scale_inv")] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)

    edit_tensors(folder, again)


@pytest.mark.parametrize(
    ("scale_fmt", "factor", "expected"),
    [("ue8m0", 1, set()), (None, 1, {"D6", "V6"}), ("ue8m0", 2, {"D6", "V6"}), ("ue8m0", 0.5, {"V6"})],
)
def test_scales_of_scale_fmt_ue8m0_are_powers_of_two(
    dense: Path, tmp_path: Path, scale_fmt: str | None, factor: float, expected: set[str]
) -> None:
    folder = reference.quantize(dense, tmp_path / "fp8", method="fp8", strategy="block", static=False)
    by_powers_of_two(folder, dense, factor=factor)
    edit_quantization(folder, lambda quant: quant.update(scale_fmt=scale_fmt))
    found, reported = problems(folder, dense)
    assert expected <= found and bool(found) is bool(expected), reported
