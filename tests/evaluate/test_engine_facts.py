"""What a report says of kernels and attention can be read from every class that vLLM has for them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "vllm_layers.py"
NEED_ANOTHER_PLATFORM = ("amd/", "nvidia/", "rocm", "flashinfer", "ultraquant")


@pytest.fixture(scope="module")
def seen(warm_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    answer = tmp_path_factory.mktemp("layers") / "answer.json"
    subprocess.run([warm_python, str(SCRIPT), str(answer)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(answer.read_text())


def test_every_attention_layer_tells_its_backend(seen: dict[str, Any]) -> None:
    unread = {name: found for name, found in seen["attention"].items() if len(found["attention"]) != 1}
    assert unread == {}
    assert len(seen["attention"]) > 40
    assert seen["attention"]["vllm.model_executor.layers.attention.attention.Attention"] == {
        "kernels": [],
        "attention": ["CPU_ATTN"],
        "kv_cache": ["fp8"],
    }


def test_a_towers_backend_is_the_member_of_an_enum(seen: dict[str, Any]) -> None:
    """Qwen2.5-VL's tower, for one, on any of vLLM's backends."""
    assert {name: found["attention"] for name, found in seen["towers"].items()} == {
        name: [name.split()[1]] for name in seen["towers"]
    }
    assert "MMEncoderAttention TORCH_SDPA" in seen["towers"]


def test_every_kernel_tells_its_name(seen: dict[str, Any]) -> None:
    assert {name: found["kernels"] for name, found in seen["linear"].items()} == {
        name: [name] for name in seen["linear"]
    }
    assert {name: found["kernels"] for name, found in seen["experts"].items()} == {
        name: [f"{name}(fp8_w8a8)"] for name in seen["experts"]
    }
    assert {"CutlassFP8ScaledMMLinearKernel", "DeepGemmFp8BlockScaledMMKernel"} <= seen["linear"].keys()
    assert {"TritonExperts", "TrtLlmFp8ExpertsMonolithic", "DeepGemmExperts"} <= seen["experts"].keys()


def test_layers_in_16_bits_are_no_kernel_of_a_scheme(seen: dict[str, Any]) -> None:
    """Routers and experts that ranks share have methods of their own, which no gate may take for a wrong kernel."""
    assert {name: found["kernels"] for name, found in seen["unquantized"].items()} == {
        name: [] for name in seen["unquantized"]
    }
    assert {"_GateLinearMethod", "shared"} <= seen["unquantized"].keys()


def test_only_classes_of_other_platforms_are_left_out(seen: dict[str, Any]) -> None:
    torchvision = {"cohere_asr", "cosmos3_edge", "terratorch", "kda"}  # and torchaudio: not in the CPU environment
    left = [path for path in seen["missing"] if not any(part in path for part in NEED_ANOTHER_PLATFORM)]
    assert {Path(path).stem for path in left} <= torchvision
