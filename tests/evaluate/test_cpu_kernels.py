"""FP8 on vLLM's CPU platform: the arithmetic by itself, then each kernel in real vLLM modules against another one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import TESTS
from support.tiny_models import calibration_for, make_model, plan_of, recipe

from fp8pipe.config import Recipe
from fp8pipe.evaluate.cpu.quantize import dequantize, quantize_groups, scaled_fp8_quant
from fp8pipe.hub.source import resolve
from fp8pipe.quantize import quantize

# ---------------------------------------------------------------------------------------------- the plugin's arithmetic


def e4m3_table() -> list[float]:
    """Value of each of the 256 E4M3 (fn) codes, from the bits; NaN for the two NaN codes."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 7
        magnitude = math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10)
        values.append(math.nan if code & 0x7F == 0x7F else sign * magnitude)
    return values


VALUES = np.array(e4m3_table())
MIDDLES = (VALUES[:0x7E] + VALUES[1:0x7F]) / 2
"""Between each positive code's value and the next."""


def nearest_codes(x: np.ndarray) -> np.ndarray:
    """The codes whose values are nearest to x, ties to the even code, saturating: an independent rounding."""
    below = np.searchsorted(MIDDLES, np.abs(x))
    tied = MIDDLES[np.minimum(below, len(MIDDLES) - 1)] == np.abs(x)
    return below + (tied & (below % 2 == 1)) + 0x80 * np.signbit(x)


def codes_of(quotients: Any) -> list[list[int]]:
    return nearest_codes(torch.as_tensor(quotients).double().numpy()).tolist()


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


def test_groups_have_scales_of_their_own_down_to_tiny_values(activations: Any) -> None:
    """Groups of 3 in rows of 8: the last one is short. vLLM's GPU kernels bound the amax by 1e-10, not the scale."""
    x = activations * 1e-7
    codes, scale = quantize_groups(x, 3)
    groups = [x[:, i : i + 3].double().abs().amax(dim=1).clamp(min=1e-10) / 448 for i in (0, 3, 6)]
    torch.testing.assert_close(scale, torch.stack(groups, dim=1).float(), rtol=1e-6, atol=0)
    spread = scale.repeat_interleave(3, dim=1)[:, :8]
    assert codes.view(torch.uint8).tolist() == codes_of(x.float() / spread)
    torch.testing.assert_close(dequantize(codes, scale, (1, 3)), codes.float() * spread, rtol=0, atol=0)


def test_blocks_of_a_weight_spread_over_their_own_codes_and_short_ones_at_the_ends() -> None:
    codes = torch.ones(5, 7).to(torch.float8_e4m3fn)
    scale = torch.arange(6.0).reshape(2, 3)
    expected = [[scale[i // 3, j // 3].item() for j in range(7)] for i in range(5)]
    assert dequantize(codes, scale, (3, 3)).tolist() == expected


def test_plugin_touches_nothing_on_another_platform(tmp_path: Path) -> None:
    """A vllm that has nothing but a CUDA platform: importing or replacing anything else would fail."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm" / "platforms.py").write_text("class current_platform:\n  is_cpu = staticmethod(lambda: False)\n")
    code = (
        "import sys; from fp8pipe.evaluate import cpu_platform; cpu_platform.register(); exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)


# ---------------------------------------------------------------------------------------------- in vLLM's modules

WIDE: dict[str, Any] = {
    "hidden_size": 320,  # two blocks and a half
    "intermediate_size": 384,
    "head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {name: value for name, value in WIDE.items() if name != "head_dim"} | {"hidden_size": 256},
    "qwen3-moe": WIDE | {"moe_intermediate_size": 128},
    "mixtral": WIDE,
    "deepseek-v2": {
        "hidden_size": 320,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "head_dim": 64,
    },
}
LINEAR_IN_BLOCKS = "ReferenceFp8BlockScaledMMLinearKernel"
LINEAR_W8A8 = "ReferenceFp8W8A8LinearKernel"
CASES: dict[str, tuple[str, Recipe, str]] = {
    "channel": ("qwen3-moe", recipe("fp8-dynamic"), LINEAR_W8A8),
    "static": ("mixtral", recipe("fp8-static"), LINEAR_W8A8),
    "static, MLA": ("deepseek-v2", recipe("fp8-static"), LINEAR_W8A8),
    "tensor": ("qwen3-moe", recipe("autofp8-dynamic"), LINEAR_W8A8),
    "block": ("qwen3-moe", recipe("fp8-block"), LINEAR_IN_BLOCKS),
    "block, MLA, fp8": ("deepseek-v2", recipe("fp8-block", checkpoint_format="fp8"), LINEAR_IN_BLOCKS),
    "block, bias": ("qwen2", recipe("fp8-block"), LINEAR_IN_BLOCKS),
    "weight only": ("qwen2", recipe("fp8-dynamic", activations=None), "ReferenceFp8W8A16LinearKernel"),
    "weight only, tensor": ("qwen2", recipe("fp8-static", activations=None), "ReferenceFp8W8A16LinearKernel"),
}
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
CLOSE = 6e-3
"""Relative L2 distance of a row. The answer is rounded to bf16: 2e-3 at most; accumulation moves a value across a
rounding boundary now and then. Leaving activations in 16 bits makes it 2e-2 and more, which each test makes sure of."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case's checkpoint, with the answers of vLLM's modules beside it; one vLLM process for all."""
    root, folders = tmp_path_factory.mktemp("served"), {}
    for case, (name, wanted, _) in CASES.items():
        source = root / name
        if not source.exists():
            make_model(source, name, **MODELS[name])
        plan = plan_of(source, wanted)
        folders[case] = root / f"checkpoint {len(folders)}"
        # No round numbers: bf16 values divided by them would lie on ties, which float32 and float64 break differently.
        ranges = {name: 1 + math.sqrt(2 + index) for index, name in enumerate(plan.calibrated_modules())}
        calibration = calibration_for(plan, inputs=ranges)
        quantize(resolve(str(source)), plan, folders[case], calibration=calibration)
    script = TESTS / "support" / "vllm_modules.py"
    subprocess.run([sys.executable, str(script), *map(str, folders.values())], check=True)
    return folders


class Checkpoint:
    """What a checkpoint's tensors mean, in float64."""

    def __init__(self, folder: Path, wanted: Recipe) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for path in folder.glob("*.safetensors"):
            self.tensors |= load_file(path)
        self.recipe = wanted

    def weight(self, module: str) -> np.ndarray:
        """[out, in]"""
        codes = self.tensors[f"{module}.weight"].view(torch.uint8).numpy()
        name = f"{module}.weight_scale" if f"{module}.weight_scale" in self.tensors else f"{module}.weight_scale_inv"
        scale = self.tensors[name].double().numpy()
        if self.recipe.weights.strategy == "block":
            scale = scale.repeat(128, axis=0).repeat(128, axis=1)[: codes.shape[0], : codes.shape[1]]
        return VALUES[codes] * scale

    def bias(self, modules: Iterable[str]) -> np.ndarray | float:
        biases = [self.tensors[f"{m}.bias"].double().numpy() for m in modules if f"{m}.bias" in self.tensors]
        return np.concatenate(biases) if biases else 0.0

    def rounded(self, x: np.ndarray, modules: Iterable[str]) -> np.ndarray:
        """`x` as the recipe's quantization of activations leaves it, before these modules."""
        if self.recipe.activations is None:
            return x
        scale = self.activation_scale(x, [self.tensors.get(f"{module}.input_scale") for module in modules])
        return VALUES[nearest_codes(x / scale)] * scale

    def activation_scale(self, x: np.ndarray, given: list[torch.Tensor | None]) -> Any:
        assert self.recipe.activations is not None
        if self.recipe.activations.mode == "static":
            return max(float(scale) for scale in given if scale is not None)
        if self.recipe.activations.strategy == "group":
            padded = np.pad(np.abs(x), ((0, 0), (0, -x.shape[1] % 128)))
            amax = padded.reshape(len(x), -1, 128).max(axis=2)
            return (np.maximum(amax, 1e-10) / 448).repeat(128, axis=1)[:, : x.shape[1]]
        amax = np.abs(x).max(axis=1, keepdims=True) if self.recipe.activations.strategy == "token" else np.abs(x).max()
        return np.maximum(amax / 448, 1 / (448 * 512))


def bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().double().numpy()


def distance(answer: np.ndarray, expected: np.ndarray) -> float:
    """Largest relative L2 distance of a row; rows that must be zero have to be."""
    norm = np.linalg.norm(expected, axis=1)
    assert np.all(answer[norm == 0] == 0)
    return float((np.linalg.norm(answer - expected, axis=1)[norm > 0] / norm[norm > 0]).max())


def parts_of(name: str) -> list[str]:
    """The checkpoint's modules that vLLM's module holds."""
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in FUSED.get(leaf, (leaf,))]


def linear(checkpoint: Checkpoint, modules: list[str], x: np.ndarray, *, quantized: bool = True) -> np.ndarray:
    weight = np.concatenate([checkpoint.weight(module) for module in modules])
    entering = checkpoint.rounded(x, modules) if quantized else x
    return entering @ weight.T + checkpoint.bias(modules)


def experts(
    checkpoint: Checkpoint,
    prefix: str,
    x: np.ndarray,
    weights: np.ndarray,
    ids: np.ndarray,
    biases: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Sum over a token's experts; the values between the two products are in bf16, as in the model's own layers."""
    mixtral = f"{prefix}.0.w1.weight" in checkpoint.tensors
    leaves = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    modules = [[f"{prefix}.{expert}.{leaf}" for leaf in leaves] for expert in range(4)]
    token, slot = np.indices(ids.shape).reshape(2, -1)
    chosen = ids[token, slot]
    entering = checkpoint.rounded(x[token], [name for gate, up, _ in modules for name in (gate, up)])
    inner = np.zeros((len(chosen), checkpoint.weight(modules[0][0]).shape[0]))
    for row, expert in enumerate(chosen):
        gate, up = (checkpoint.weight(module) @ entering[row] for module in modules[expert][:2])
        if biases is not None:
            gate, up = gate + biases[0][expert, : len(gate)], up + biases[0][expert, len(gate) :]
        gate, up = bf16(gate), bf16(up)
        inner[row] = bf16(gate / (1 + np.exp(-gate)) * up)
    entering = checkpoint.rounded(inner, [down for _, _, down in modules])
    answer = np.zeros((len(x), checkpoint.weight(modules[0][2]).shape[0]))
    for row, expert in enumerate(chosen):
        down = checkpoint.weight(modules[expert][2]) @ entering[row]
        answer[token[row]] += weights[token[row], slot[row]] * (down + (0 if biases is None else biases[1][expert]))
    return answer


def answers_of(served: dict[str, Path], case: str, kind: str) -> tuple[Checkpoint, dict[str, dict[str, Any]]]:
    """The checkpoint, and vLLM's answers of its Linears or its experts, tensors as float64 arrays."""
    found = torch.load(served[case] / "answers.pt")
    wanted = {name: told for name, told in found.items() if ("weights" in told) == (kind == "experts")}
    plain = {
        name: {key: v.double().numpy() if isinstance(v, torch.Tensor) else v for key, v in told.items()}
        for name, told in wanted.items()
    }
    return Checkpoint(served[case], CASES[case][1]), plain


@pytest.mark.vllm
@pytest.mark.parametrize("case", CASES)
def test_vllms_linears_answer_as_the_checkpoint_means_them(served: dict[str, Path], case: str) -> None:
    checkpoint, found = answers_of(served, case, "linear")
    assert {told["kernel"] for told in found.values()} == {CASES[case][2]}
    parts = {name: parts_of(name) for name in found}
    for name, told in found.items():
        x, y = told["x"], told["y"]
        assert distance(y, linear(checkpoint, parts[name], x)) < CLOSE, name
        if checkpoint.recipe.activations is not None:
            assert distance(y, linear(checkpoint, parts[name], x, quantized=False)) > 2 * CLOSE, name
    fp8 = {name.removesuffix(".weight") for name, t in checkpoint.tensors.items() if t.dtype == torch.float8_e4m3fn}
    asked = {module for modules in parts.values() for module in modules}
    absorbed = {name for name in fp8 if name.endswith(".kv_b_proj") and torch.cpu._is_amx_tile_supported()}
    assert asked | absorbed == {name for name in fp8 if ".experts." not in name}


@pytest.mark.vllm
@pytest.mark.parametrize("case", [case for case, (name, _, _) in CASES.items() if name != "qwen2"])
def test_vllms_experts_answer_as_the_checkpoint_means_them(served: dict[str, Path], case: str) -> None:
    checkpoint, found = answers_of(served, case, "experts")
    assert {told["kernel"] for told in found.values()} == {"ReferenceFp8Experts(fp8_w8a8)"}
    for name, told in found.items():
        prefix = name[: name.index(".experts") + len(".experts")]
        x, weights, ids = told["x"], told["weights"], told["ids"].astype(int)
        assert distance(told["y"], experts(checkpoint, prefix, x, weights, ids)) < CLOSE
        biases = (told["bias1"], told["bias2"])
        assert distance(told["biased"], experts(checkpoint, prefix, x, weights, ids, biases)) < CLOSE
        weighted = bf16(x * bf16(weights[:, :1]))
        assert distance(told["first"], experts(checkpoint, prefix, weighted, np.ones((len(x), 1)), ids[:, :1])) < CLOSE


@pytest.mark.vllm
def test_mla_rotates_every_head_by_its_tokens_position(served: dict[str, Path]) -> None:
    """DeepSeek turns neighbours: each pair of features is a complex number, multiplied by exp(i position theta)."""
    told = {name: t.double().numpy() for name, t in torch.load(served["static, MLA"] / "rotated.pt").items()}
    features = told["x"].shape[2]
    turns = np.exp(1j * np.outer(told["positions"], 10000.0 ** -(np.arange(0, features, 2) / features)))
    expected = (told["x"][..., ::2] + 1j * told["x"][..., 1::2]) * turns[:, None]
    answer = told["y"].reshape(told["x"].shape)
    np.testing.assert_allclose(answer[..., ::2] + 1j * answer[..., 1::2], expected, atol=2e-2)
