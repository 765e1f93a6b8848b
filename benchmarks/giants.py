"""Checkpoints of published giants, headers and configs as they are, the data holes that occupy no disk.

    python -m benchmarks.giants [--folder DIR] [--oracles]

Two layouts: Llama 3 70B quantized by fp8-dynamic, and DeepSeek-V3 671B as it is published (FP8 blocks, 256 experts a
layer, a 62nd layer that predicts a second token). Times of `fp8pipe validate` by headers: inside, whole process, and of
Llama over HTTP from a Hub on loopback, as many tensors and shards at a 64th of the width; with --oracles also of
transformers' and vLLM's own model on the meta device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fp8pipe.model.headers import ITEM_BYTES, TensorInfo, header_bytes, index_bytes

SHARD_BYTES = 5_000_000_000
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name on disk -> dtype and shape."""

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "moe_layer_freq": 1,
}
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def llama_70b(folder: Path, *, shrink: int = 1) -> Path:
    """Llama 3 70B under the recipe fp8-dynamic, every width divided by `shrink`."""
    from fp8pipe.config import load_recipe
    from fp8pipe.quantize.formats import format_of, kept_of

    recipe = load_recipe("fp8-dynamic")
    widths = ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
    config = LLAMA_70B | {name: LLAMA_70B[name] // shrink for name in widths}
    quantization = format_of(recipe).quantization_config(recipe, kept_of(["lm_head"], (), ()), with_kv=False)
    tensors = dict(_quantized(llama_tensors(config), block=None))
    return _write(folder, config | {"quantization_config": quantization}, tensors, SHARD_BYTES // shrink**2)


def deepseek_v3(folder: Path, *, predictor: bool = True) -> Path:
    """DeepSeek-V3, with or without the layer that predicts a second token, which vLLM's main model drops."""
    config = DEEPSEEK_V3 | {"num_nextn_predict_layers": int(predictor)}
    tensors = dict(_quantized(deepseek_tensors(config), block=128))
    return _write(folder, config | {"quantization_config": BLOCKS}, tensors, SHARD_BYTES)


def llama_tensors(config: Mapping[str, Any]) -> Tensors:
    """Every tensor of the model in BF16."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    tensors = _outer(hidden, vocabulary)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        tensors |= {f"{at}.self_attn.{name}_proj.weight": ("BF16", shape) for name, shape in shapes.items()}
        tensors |= _mlp(f"{at}.mlp", hidden, inner) | _norms(at, hidden)
    return tensors


def deepseek_tensors(config: Mapping[str, Any]) -> Tensors:
    """Every tensor of the model in BF16."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    query = config["q_lora_rank"]
    tensors = _outer(hidden, config["vocab_size"])
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        at = f"model.layers.{layer}"
        if layer >= config["num_hidden_layers"]:
            tensors |= _predictor(at, hidden, config["vocab_size"])
        shapes = {
            "q_a_proj": (query, hidden),
            "q_a_layernorm": (query,),
            "q_b_proj": (heads * (nope + rope), query),
            "kv_a_proj_with_mqa": (rank + rope, hidden),
            "kv_a_layernorm": (rank,),
            "kv_b_proj": (heads * (nope + value), rank),
            "o_proj": (hidden, heads * value),
        }
        tensors |= {f"{at}.self_attn.{name}.weight": ("BF16", shape) for name, shape in shapes.items()}
        tensors |= _norms(at, hidden)
        if layer < config["first_k_dense_replace"]:
            tensors |= _mlp(f"{at}.mlp", hidden, config["intermediate_size"])
            continue
        experts = config["n_routed_experts"]
        tensors[f"{at}.mlp.gate.weight"] = ("BF16", (experts, hidden))
        tensors[f"{at}.mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
        for name in ("shared_experts", *(f"experts.{expert}" for expert in range(experts))):
            tensors |= _mlp(f"{at}.mlp.{name}", hidden, config["moe_intermediate_size"])
    return tensors


def _predictor(at: str, hidden: int, vocabulary: int) -> Tensors:
    """What the layer that predicts a second token has beside those of any other layer: none of it is quantized."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (vocabulary, hidden),
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
        "shared_head.norm": (hidden,),
        "shared_head.head": (vocabulary, hidden),
    }
    return {f"{at}.{name}.weight": ("BF16", shape) for name, shape in shapes.items()}


def _outer(hidden: int, vocabulary: int) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def _mlp(at: str, hidden: int, inner: int) -> Tensors:
    up = {f"{at}.{name}_proj.weight": ("BF16", (inner, hidden)) for name in ("gate", "up")}
    return up | {f"{at}.down_proj.weight": ("BF16", (hidden, inner))}


def _norms(at: str, hidden: int) -> Tensors:
    return {f"{at}.{name}_layernorm.weight": ("BF16", (hidden,)) for name in ("input", "post_attention")}


def _quantized(tensors: Tensors, block: int | None) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """FP8 codes and their scales in place of every projection: by row, or by blocks as the fp8 method names them."""
    for name, (dtype, shape) in tensors.items():
        if "_proj" not in name or "eh_proj" in name:
            yield name, (dtype, shape)
            continue
        yield name, ("F8_E4M3", shape)
        if block is None:
            yield f"{name}_scale", ("F32", (shape[0], 1))
        else:
            yield f"{name}_scale_inv", ("F32", (-(-shape[0] // block), -(-shape[1] // block)))


def _write(folder: Path, config: Mapping[str, Any], tensors: Tensors, shard_bytes: int) -> Path:
    """Config, index, and shards whose data is a hole."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = ITEM_BYTES[dtype]
        for side in shape:
            size *= side
        if filled + size > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape, size))
        filled += size
    placed: list[TensorInfo] = []
    for number, members in enumerate(shards, 1):
        shard, at, here = f"model-{number:05d}-of-{len(shards):05d}.safetensors", 0, []
        for name, dtype, shape, size in members:
            here.append(TensorInfo(name, dtype, shape, shard, at, at + size))
            at += size
        header = header_bytes(here, 0)
        with (folder / shard).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + at)
        placed += here
    (folder / "model.safetensors.index.json").write_bytes(index_bytes(placed))
    return folder


# ---------------------------------------------------------------------------------------------- measuring


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoints go")
    parser.add_argument("--oracles", action="store_true", help="also ask transformers and vLLM")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for make in (llama_70b, deepseek_v3):
            _measure(make(Path(scratch) / make.__name__), oracles=options.oracles)
        _over_http(Path(scratch))


def _measure(folder: Path, *, oracles: bool) -> None:
    from fp8pipe.validate import all_checks, validate

    all_checks()
    began = time.perf_counter()
    report = validate(folder, depth="headers")
    seconds = time.perf_counter() - began
    print(f"{folder.name}: {report.tensors} tensors, findings: {[f.sentence() for f in report.findings]}")
    print(f"  headers, inside         {seconds:6.2f} s")
    _timed("headers, whole process", folder, "--depth", "headers", "--no-oracles")
    if oracles:
        for what in ("with both oracles", "again, record kept"):
            _timed(what, folder, "--depth", "headers", "--oracles")


def _over_http(scratch: Path) -> None:
    from fp8pipe.rehearsal import localhub

    folder = llama_70b(scratch / "narrow", shrink=64)
    with localhub.start(scratch / "hub") as hub:
        os.environ |= hub.environment()
        from huggingface_hub import HfApi

        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("giants/llama-70b")
        api.upload_folder(repo_id="giants/llama-70b", folder_path=folder)
        print(f"llama_70b over HTTP, {len(list(folder.glob('*.safetensors')))} shards")
        _timed("headers, whole process", "giants/llama-70b", "--no-oracles")


def _timed(what: str, *arguments: Any) -> None:
    command = [Path(sys.executable).with_name("fp8pipe"), "validate", *arguments]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"  {what:<24}{time.perf_counter() - began:6.2f} s   exit code {done.returncode}")


if __name__ == "__main__":
    main()
