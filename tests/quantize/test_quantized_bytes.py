"""Quantized bytes equal a naive reference on whole tensors, for every scheme, dtype and architecture."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.numerics import reference_amax, reference_codes
from support.quantizing import (
    SCHEMES,
    Models,
    assert_equals_reference,
    edit_tensors,
    make,
    same_bytes,
    tensors_of,
)
from support.tiny_models import architecture_of, recipe
from torch import Tensor

from fp8pipe.errors import NonFiniteWeight
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.architecture import ExpertLayout, TensorRole
from fp8pipe.quantize import quantize
from fp8pipe.quantize.engine import views
from fp8pipe.quantize.plan import Plan, make_plan

RAGGED = {"head_dim": 64, "intermediate_size": 384, "hidden_size": 200}
"""Fused projections fit blocks of 128; the hidden size does not."""


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [(scheme, "bfloat16") for scheme in SCHEMES]
    + [(scheme, dtype) for scheme in ("channel", "tensor", "block mse") for dtype in ("float16", "float32")],
)
def test_bytes_equal_the_reference(model_folder: Models, tmp_path: Path, scheme: str, dtype: str) -> None:
    source = model_folder("llama", dtype=dtype, **RAGGED)
    plan, _ = make(source, recipe(**SCHEMES[scheme]), tmp_path / "out")
    assert any(output.role == "weight" for output in plan.outputs)
    assert_equals_reference(tensors_of(source), tensors_of(tmp_path / "out"), plan)


@pytest.mark.parametrize("scheme", ["block", "channel mse", "block mse"])
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_experts_equal_the_reference_under_every_scheme(
    model_folder: Models, tmp_path: Path, name: str, scheme: str
) -> None:
    source = model_folder(name, hidden_size=256, moe_intermediate_size=128, intermediate_size=128)
    plan, _ = make(source, recipe(**SCHEMES[scheme]), tmp_path / "out")
    assert any(".experts." in output.name and output.role == "weight" for output in plan.outputs)
    assert_equals_reference(tensors_of(source), tensors_of(tmp_path / "out"), plan)


@pytest.mark.parametrize(
    "name",
    [
        *("llama-tied", "qwen2", "qwen3-moe", "mixtral", "gemma3-text", "phi3", "opt", "deepseek-v2", "gpt-oss"),
        "granitemoe",
    ],
)
def test_every_architecture_equals_the_reference(model_folder: Models, tmp_path: Path, name: str) -> None:
    plan, _ = make(model_folder(name), recipe(), tmp_path / "out")
    assert_equals_reference(tensors_of(model_folder(name)), tensors_of(tmp_path / "out"), plan)


# ---------------------------------------------------------------------------------------------- experts in one tensor

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def plan_with_layout(source: Path, *, transposed: bool, interleaved: bool) -> Plan:
    """The plan for a model whose first experts were stored with this layout."""
    layout = ExpertLayout(transposed=transposed, interleaved=interleaved, projections=("gate_proj", "up_proj"))
    role = TensorRole(kind="fused_experts", parameter="gate_up_proj", layout=layout)
    found = architecture_of(source)
    changed = found.model_copy(update={"tensors": found.tensors | {GATE_UP: role}})
    snapshot = resolve(str(source))
    return make_plan(snapshot, read_headers(snapshot), recipe(), changed)


def expert_matrices(tensor: Tensor, *, transposed: bool, interleaved: bool) -> dict[str, Tensor]:
    """The gate and up weights [out, in] of every expert, by plain indexing."""
    found = {}
    for expert, stored in enumerate(tensor):
        matrix = stored.T if transposed else stored
        half = len(matrix) // 2
        gate, up = (matrix[0::2], matrix[1::2]) if interleaved else (matrix[:half], matrix[half:])
        holder = GATE_UP.rpartition(".")[0]
        found |= {f"{holder}.{expert}.gate_proj.weight": gate, f"{holder}.{expert}.up_proj.weight": up}
    return found


@pytest.mark.parametrize("stripe", [70, 4 << 20])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_experts_in_one_tensor_are_split_row_by_row(
    model_folder: Models,
    tmp_path: Path,
    transposed: bool,
    interleaved: bool,
    stripe: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(views, "STRIPE_BYTES", stripe)
    monkeypatch.setattr(views, "TRANSPOSED_STRIPE_BYTES", stripe)
    source = model_folder("gpt-oss", shard_size="1GB")
    plan = plan_with_layout(source, transposed=transposed, interleaved=interleaved)
    quantize(resolve(str(source)), plan, tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    stored = load_file(source / "model.safetensors")[GATE_UP]
    expected = expert_matrices(stored, transposed=transposed, interleaved=interleaved)
    assert len(expected) == 8
    for name, weight in expected.items():
        scale = reference_amax(weight, "channel") / 448
        assert torch.equal(made[f"{name}_scale"], scale)
        assert same_bytes(made[name], reference_codes(weight, scale)), name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_nonfinite_expert_is_named_with_its_index_in_the_source(
    model_folder: Models, tmp_path: Path, transposed: bool, interleaved: bool
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("gpt-oss", shard_size="1GB"), source)
    edit_tensors(source, lambda tensors: tensors[GATE_UP][2, 5, 7].fill_(torch.inf))
    plan = plan_with_layout(source, transposed=transposed, interleaved=interleaved)
    with pytest.raises(NonFiniteWeight, match=re.escape(f"{GATE_UP}[2, 5, 7] is inf")):
        quantize(resolve(str(source)), plan, tmp_path / "out")
