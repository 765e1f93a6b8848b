"""What llm-compressor makes of three small weights: tests/data/llmcompressor.safetensors. Made once with its own
environment, from the folder above tests:

    build/peer/bin/python tests/data/make_llmcompressor.py       (python -m benchmarks.quantize builds build/peer)

For each scheme: `SCHEME.source` bf16, `SCHEME.weight` float8_e4m3fn and `SCHEME.weight_scale` as llm-compressor wrote
them."""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from llmcompressor import model_free_ptq
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.contender import peer_config

SHAPES = {"FP8_DYNAMIC": (24, 48), "FP8_BLOCK": (10, 256), "per-tensor": (16, 48)}
EVEN_ROWS = 8
NAME = "model.layers.0.mlp.up_proj"


def weight_of(shape: tuple[int, int], seed: int, even_rows: int) -> torch.Tensor:
    """Random rows; the largest magnitudes of the first `even_rows` are 448 x 2^k: their scales are powers of two."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    for row in range(even_rows):
        weight[row] *= 0.2 / weight[row].abs().max()
        weight[row, row % shape[1]] = 448 * 2.0 ** (-10 - row % 2)
    return weight.bfloat16()


def quantized(weight: torch.Tensor, scheme: str) -> dict[str, torch.Tensor]:
    """The tensors that llm-compressor writes for a model of this one weight."""
    with tempfile.TemporaryDirectory() as name:
        source, out = Path(name) / "source", Path(name) / "out"
        source.mkdir()
        (source / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
        save_file({f"{NAME}.weight": weight}, source / "model.safetensors", {"format": "pt"})
        model_free_ptq(source, out, config=peer_config(scheme), max_workers=1)
        return load_file(out / "model.safetensors")


def main() -> None:
    tensors = {}
    for seed, (scheme, shape) in enumerate(SHAPES.items()):
        tensors[f"{scheme}.source"] = weight_of(shape, seed, EVEN_ROWS if scheme == "FP8_DYNAMIC" else 0)
        made = quantized(tensors[f"{scheme}.source"], scheme)
        tensors |= {f"{scheme}.{leaf}": made[f"{NAME}.{leaf}"] for leaf in ("weight", "weight_scale")}
    made_by = {"llmcompressor": version("llmcompressor"), "torch": version("torch")}
    save_file(tensors, Path(__file__).with_name("llmcompressor.safetensors"), made_by)


main()
