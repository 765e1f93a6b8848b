"""FP8 on vLLM's CPU platform: the arithmetic by itself, then each kernel in real vLLM modules against another one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8pipe.evaluate.cpu.quantize import dequantize, quantize_groups, scaled_fp8_quant

# ---------------------------------------------------------------------------------------------- the plugin's arithmetic


def e4m3_table() -> list[float]:
    """Value of each of the 256 E4M3 (fn) codes, from the bits; NaN for the two NaN codes."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 7
        magnitude = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
        values.append(math.nan if code & 0x7F == 0x7F else sign * magnitude)
    return values


def nearest_code(x: float) -> int:
    """The code whose value is nearest to x, ties to the even code: an independent rounding, one value at a time."""
    finite = [(abs(value - x), code & 1, code) for code, value in enumerate(e4m3_table()[:0x7F])]
    magnitude = min((abs(v - abs(x)), odd, c) for (_, odd, c), v in zip(finite, e4m3_table(), strict=False))[2]
    return magnitude | (0x80 if math.copysign(1.0, x) < 0 else 0)


def codes_of(quotients: Any) -> list[list[int]]:
    return [[nearest_code(max(-448.0, min(448.0, float(q)))) for q in row] for row in quotients]


@pytest.fixture(scope="module")
def activations() -> Any:
    """[6, 8] bf16: ordinary values, an all-zero row, saturating values, and exact ties between codes."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 8, generator=generator) * 3
    x[1] = 0
    x[2, :4] = torch.tensor([1000.0, -1000.0, 449.0, -463.0])
    x[3] = torch.tensor([17.0, 19.0, -17.0, -19.0, 2**-10, 3 * 2**-10, 0.0, -0.0])
    return x.to(torch.bfloat16)


def test_given_scale_divides_clamps_and_rounds_to_even(activations: Any) -> None:
    for scale in (torch.tensor(1.0), torch.tensor([0.37])):
        codes, returned = scaled_fp8_quant(activations, scale)
        assert codes.dtype == torch.float8_e4m3fn
        assert returned is scale
        assert codes.view(torch.uint8).tolist() == codes_of(activations.float() / scale)


def test_per_token_scale_is_amax_over_448_and_never_zero(activations: Any) -> None:
    codes, scale = scaled_fp8_quant(activations, use_per_token_if_dynamic=True)
    expected = [max(max(abs(float(v)) for v in row) / 448, 1 / (448 * 512)) for row in activations]
    torch.testing.assert_close(scale, torch.tensor(expected).reshape(-1, 1), rtol=1e-7, atol=0)
    assert codes.view(torch.uint8).tolist() == codes_of(activations.float() / scale)
    _, bounded = scaled_fp8_quant(activations, scale_ub=torch.tensor(2.0), use_per_token_if_dynamic=True)
    assert float(bounded.max()) == pytest.approx(2 / 448)


def test_per_tensor_scale_is_one_value(activations: Any) -> None:
    codes, scale = scaled_fp8_quant(activations)
    assert scale.shape == (1,)
    assert float(scale) == pytest.approx(float(activations.abs().max()) / 448, rel=1e-7)
    assert codes.view(torch.uint8).tolist() == codes_of(activations.float() / scale)


@pytest.mark.parametrize(
    ("shape", "group", "spread"),
    [
        ((8,), (-1, 1), lambda s, i, j: s[j]),
        ((6,), (1, -1), lambda s, i, j: s[i]),
        ((6, 1), None, lambda s, i, j: s[i][0]),
        ((6, 2), (1, 4), lambda s, i, j: s[i][j // 4]),
        ((2, 2), (3, 4), lambda s, i, j: s[i // 3][j // 4]),
    ],
    ids=["channel", "token", "column", "group", "block"],
)
def test_given_scales_apply_to_their_own_elements(activations: Any, shape: Any, group: Any, spread: Any) -> None:
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(5)) + 0.1
    codes, _ = scaled_fp8_quant(activations, scale, group_shape=group)
    quotients = [
        [float(torch.tensor(float(activations[i, j])) / spread(scale, i, j)) for j in range(8)] for i in range(6)
    ]
    assert codes.view(torch.uint8).tolist() == codes_of(quotients)


def test_padding_adds_zero_rows_and_output_is_filled(activations: Any) -> None:
    plain, _ = scaled_fp8_quant(activations, use_per_token_if_dynamic=True)
    padded, scale = scaled_fp8_quant(activations, num_token_padding=9, use_per_token_if_dynamic=True)
    assert padded.shape == (9, 8)
    assert scale.shape == (9, 1)
    assert torch.equal(padded[:6].view(torch.uint8), plain.view(torch.uint8))
    assert not padded[6:].view(torch.uint8).any()
    output = torch.empty(6, 8, dtype=torch.float8_e4m3fn)
    returned, _ = scaled_fp8_quant(activations, use_per_token_if_dynamic=True, output=output)
    assert returned is output
    assert torch.equal(output.view(torch.uint8), plain.view(torch.uint8))


def test_plugin_touches_nothing_on_another_platform(tmp_path: Path) -> None:
    """A vllm that has nothing but a CUDA platform: importing or replacing anything else would fail."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm" / "platforms.py").write_text("class current_platform:\n  is_cpu = staticmethod(lambda: False)\n")
    code = (
        "import sys; from fp8pipe.evaluate import cpu_platform; cpu_platform.register(); exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)
