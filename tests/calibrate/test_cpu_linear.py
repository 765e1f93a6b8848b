"""16-bit Linears on a CPU without instructions for them: float32 products, rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import STATIC_KV, make_model, run_calibration, with_data, write_dataset
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8pipe.calibrate import cpu_linear


class _Products(TorchDispatchMode):
    """Records the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func):  # mm, addmm
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_without_instructions_are_float32_rounded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear, "NATIVE", {dtype: lambda: False})
    monkeypatch.setattr(cpu_linear, "WEIGHTS_AT_ONCE", 5 * 64)  # 37 rows in pieces of 5
    linear = nn.Linear(64, 37).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randint(-9, 10, parameter.shape))  # sums of integers are exact in any order
    values = torch.randint(-9, 10, (2, 3, 64)).float()
    expected = linear(values)
    assert (expected.to(dtype).float() != expected).any() or dtype == torch.float16  # bf16 does round some
    with cpu_linear.fast_products(dtype, torch.device("cpu")), _Products() as products:
        found = linear.to(dtype)(values.to(dtype))
    assert torch.equal(found, expected.to(dtype))
    assert products.dtypes == [torch.float32] * 8


def test_products_of_other_types_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "NATIVE", {torch.bfloat16: lambda: False})
    linear, values = nn.Linear(64, 37).requires_grad_(False), torch.randn(6, 64)
    with cpu_linear.fast_products(torch.bfloat16, torch.device("cpu")), _Products() as products:
        found = linear(values)
    assert torch.equal(found, linear(values))
    assert products.dtypes == [torch.float32]


def test_ranges_of_a_bf16_model_agree_with_and_without_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", "llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="80KB")
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    found = []
    for native in (True, False):
        monkeypatch.setattr(cpu_linear, "NATIVE", {torch.bfloat16: lambda native=native: native})
        found.append(run_calibration(tmp_path / "model", recipe, tmp_path / f"native-{native}").inputs)
    assert found[0] == pytest.approx(found[1], rel=2**-6)  # two steps of bf16: the order of sums differs in every layer
