"""Correct little FP8 checkpoints by the shortest road: whole tensors, no tiles, none of fp8pipe's own arithmetic.

`llama(folder)` writes a two-layer BF16 Llama with tokenizer files, `quantize(source, folder, ...)` its FP8 twin.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
Strategy = Literal["tensor", "channel", "block"]
BLOCK = (32, 32)
Tensors = dict[str, torch.Tensor]


def llama(folder: Path, *, tied: bool = False, shards: int = 2, kv_heads: int = 2, intermediate: int = 160) -> Path:
    """Two layers of 64, four heads, heavy-tailed random weights in bf16; config, tokenizer and index included."""
    generator = torch.Generator().manual_seed(7)

    def weight(*shape: int) -> torch.Tensor:
        tails = 1 + 3 * torch.rand(shape, generator=generator) ** 8
        return (0.02 * torch.randn(shape, generator=generator) * tails).bfloat16()

    tensors = {"model.embed_tokens.weight": weight(96, 64), "model.norm.weight": torch.ones(64).bfloat16()}
    for layer in range(2):
        at = f"model.layers.{layer}"
        kv = 16 * kv_heads
        shapes = [(64, 64), (kv, 64), (kv, 64), (64, 64), (intermediate, 64), (intermediate, 64), (64, intermediate)]
        for name, shape in zip(PROJECTIONS, shapes, strict=True):
            block = "mlp" if name in {"gate_proj", "up_proj", "down_proj"} else "self_attn"
            tensors[f"{at}.{block}.{name}.weight"] = weight(*shape)
        tensors[f"{at}.input_layernorm.weight"] = torch.ones(64).bfloat16()
        tensors[f"{at}.post_attention_layernorm.weight"] = torch.ones(64).bfloat16()
    if not tied:
        tensors["lm_head.weight"] = weight(96, 64)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 64,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "vocab_size": 96,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-05,
        "eos_token_id": [2, 3],
    }
    return write(folder, tensors, config, shards, _tokenizer_files())


def _tokenizer_files() -> dict[str, str]:
    return {
        "tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}}}),
        "tokenizer_config.json": json.dumps({"eos_token": "</s>"}),
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": json.dumps({"eos_token_id": [2, 3]}),
        "LICENSE": "Apache 2.0",
    }


def moe(folder: Path, *, shards: int = 2) -> Path:
    """The Llama with its MLPs replaced by four experts and a router, named as Qwen3-MoE does."""
    llama(folder, shards=1)
    tensors, config = read(folder)
    generator = torch.Generator().manual_seed(8)
    for layer in range(2):
        at = f"model.layers.{layer}.mlp"
        for name in ("gate_proj", "up_proj", "down_proj"):
            del tensors[f"{at}.{name}.weight"]
            for expert in range(4):
                shape = (64, 32) if name == "down_proj" else (32, 64)
                values = 0.02 * torch.randn(shape, generator=generator)
                tensors[f"{at}.experts.{expert}.{name}.weight"] = values.bfloat16()
        tensors[f"{at}.gate.weight"] = (0.02 * torch.randn((4, 64), generator=generator)).bfloat16()
    moe_config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4}
    (folder / "model.safetensors").unlink()
    return write(folder, tensors, config | moe_config | {"moe_intermediate_size": 32}, shards, {})


# ---------------------------------------------------------------------------------------------- FP8


def quantize(
    source: Path,
    folder: Path,
    *,
    strategy: Strategy = "tensor",
    static: bool = True,
    kv: Literal["tensor", "attn_head"] | None = None,
    method: Literal["compressed-tensors", "fp8", "modelopt"] = "compressed-tensors",
    scale_dtype: torch.dtype = torch.float32,
    shards: int = 2,
) -> Path:
    """The FP8 twin of `source`: joint per-tensor scales in fused groups, made-up but plausible activation scales."""
    tensors, config = read(source)
    modules = [n.removesuffix(".weight") for n in tensors if n.split(".")[-2] in PROJECTIONS]
    out = dict(tensors)
    for module in modules:
        weight = tensors[f"{module}.weight"].float()
        amax = _amax(weight, strategy)
        if strategy == "tensor":
            amax = torch.stack(
                [_amax(tensors[f"{m}.weight"].float(), strategy) for m in _siblings(module, modules)]
            ).amax(0)
        scale = (amax.clamp(min=1e-12) / 448).to(scale_dtype)
        codes = (weight / _expand(scale.float(), weight, strategy)).clamp(-448, 448).to(torch.float8_e4m3fn)
        out[f"{module}.weight"] = codes
        out[f"{module}.{'weight_scale_inv' if method == 'fp8' and strategy == 'block' else 'weight_scale'}"] = scale
        if static:
            out[f"{module}.input_scale"] = torch.tensor([0.021 if module.endswith("down_proj") else 0.013])
    for layer in range(config["num_hidden_layers"]) if kv else ():
        shape = (1,) if kv == "tensor" else (config["num_key_value_heads"], 1, 1)
        out[f"model.layers.{layer}.self_attn.k_scale"] = torch.full(shape, 0.031)
        out[f"model.layers.{layer}.self_attn.v_scale"] = torch.full(shape, 0.017)
    routers = sorted(n.removesuffix(".weight") for n in tensors if n.endswith("mlp.gate.weight"))
    quant = {"fp8": _fp8, "compressed-tensors": _compressed, "modelopt": _modelopt}[method](
        strategy, static, kv, routers
    )
    return write(folder, out, config | {"quantization_config": quant}, shards, _companions(source))


def _companions(source: Path) -> dict[str, str]:
    """What goes with the weights unchanged."""
    files = (path for path in source.iterdir() if path.suffix != ".safetensors" and "index" not in path.name)
    return {path.name: path.read_text() for path in files if path.name != "config.json"}


def quantize_groups(
    source: Path,
    folder: Path,
    *,
    format: Literal["nvfp4", "mxfp4", "mxfp8"],
    method: Literal["compressed-tensors", "modelopt"] = "compressed-tensors",
    static: bool = False,
    shards: int = 2,
) -> Path:
    """`source` in a format with a scale for each 16 or 32 weights of a row. `static`: NVFP4 with input scales."""
    tensors, config = read(source)
    modules = [n.removesuffix(".weight") for n in tensors if n.split(".")[-2] in PROJECTIONS]
    out = dict(tensors)
    for module in modules:
        weight = out.pop(f"{module}.weight").float()
        joint = max(float(tensors[f"{m}.weight"].float().abs().max()) for m in _siblings(module, modules))
        stored = {"nvfp4": nvfp4, "mxfp4": mxfp4, "mxfp8": mxfp8}[format](weight, 2688 / joint)
        if method == "modelopt" and format == "nvfp4":
            stored = {"weight": stored["weight_packed"], "weight_scale": stored["weight_scale"]}
            stored["weight_scale_2"] = torch.tensor(joint / 2688)
        elif static:
            stored["input_global_scale"] = torch.tensor([2688 / (9.4 if module.endswith("down_proj") else 5.8)])
        if method == "modelopt" and static:
            stored["input_scale"] = torch.tensor((9.4 if module.endswith("down_proj") else 5.8) / 2688)
        out |= {f"{module}.{leaf}": tensor for leaf, tensor in stored.items()}
    routers = sorted(n.removesuffix(".weight") for n in tensors if n.endswith("mlp.gate.weight"))
    if method == "modelopt":
        algorithm = {"nvfp4": "NVFP4" if static else "W4A16_NVFP4", "mxfp8": "MXFP8"}[format]
        quant = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head", *routers]}
    else:
        quant = _groups_config(format, static, routers)
    return write(folder, out, config | {"quantization_config": quant}, shards, _companions(source))


def nvfp4(weight: torch.Tensor, global_scale: float) -> Tensors:
    """Codes of E2M1, E4M3 scales of 16, one divisor."""
    grouped = weight.unflatten(1, (-1, 16))
    scale = (grouped.abs().amax(2) / 6 * global_scale).to(torch.float8_e4m3fn).float()
    scale = torch.where(scale == 0, 0.125, scale).to(torch.float8_e4m3fn)
    divided = grouped / (scale.float() / global_scale)[:, :, None]
    return {
        "weight_packed": _packed(divided.flatten(1)),
        "weight_scale": scale,
        "weight_global_scale": torch.tensor([global_scale]),
    }


def mxfp4(weight: torch.Tensor, _: float = 0.0) -> Tensors:
    """Codes of E2M1, exponents of 32."""
    grouped = weight.unflatten(1, (-1, 32))
    exponent = _exponents(grouped, 2)
    codes = _packed((grouped / torch.exp2(exponent)[:, :, None]).flatten(1))
    return {"weight_packed": codes, "weight_scale": (exponent + 127).to(torch.uint8)}


def mxfp8(weight: torch.Tensor, _: float = 0.0) -> Tensors:
    """Codes of E4M3, exponents of 32."""
    grouped = weight.unflatten(1, (-1, 32))
    exponent = _exponents(grouped, 8)
    codes = (grouped / torch.exp2(exponent)[:, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(1)
    return {"weight": codes, "weight_scale": (exponent + 127).to(torch.uint8)}


def _exponents(grouped: torch.Tensor, largest: int) -> torch.Tensor:
    """Power of two for each group [rows, groups]: that of its largest weight, less that of the largest code."""
    return torch.floor(torch.log2(grouped.abs().amax(2).clamp(min=1e-30))) - largest


def _packed(scaled: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 codes, two to a byte, by trying all."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = (scaled.abs()[..., None] - values).abs().argmin(-1).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _groups_config(format: str, static: bool, routers: list[str]) -> dict[str, Any]:
    base = {"type": "float", "symmetric": True, "dynamic": False, "observer": "memoryless_minmax"}
    if format == "nvfp4":
        kind = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
        args = base | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16} | kind
    else:
        kind = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        args = base | {"num_bits": int(format[-1]), "strategy": "group", "group_size": 32} | kind
    name = "mxfp8-quantized" if format == "mxfp8" else f"{format}-pack-quantized"
    inputs = args | {"dynamic": "local"} if static else args | {"dynamic": True} if format == "mxfp8" else None
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(["re:.*mlp\\.gate$"] if routers else [])],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args, "input_activations": inputs}},
    }


def _siblings(module: str, modules: list[str]) -> list[str]:
    parent, _, leaf = module.rpartition(".")
    group = next((g for g in GROUPS if leaf in g), (leaf,))
    return [f"{parent}.{name}" for name in group if f"{parent}.{name}" in modules]


def _amax(weight: torch.Tensor, strategy: Strategy) -> torch.Tensor:
    if strategy == "tensor":
        return weight.abs().amax().reshape(1)
    if strategy == "channel":
        return weight.abs().amax(1, keepdim=True)
    rows, columns = BLOCK
    parts = [[part.abs().amax() for part in band.split(columns, 1)] for band in weight.split(rows)]
    return torch.stack([torch.stack(row) for row in parts])


def _expand(scale: torch.Tensor, weight: torch.Tensor, strategy: Strategy) -> torch.Tensor:
    if strategy != "block":
        return scale
    rows, columns = BLOCK
    wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return wide[: weight.shape[0], : weight.shape[1]]


def _fp8(strategy: Strategy, static: bool, kv: str | None, routers: list[str]) -> dict[str, Any]:
    quant: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"}
    if strategy == "block":
        quant["weight_block_size"] = list(BLOCK)
    return quant | {"ignored_layers": ["lm_head", *routers]}


def _modelopt(strategy: Strategy, static: bool, kv: str | None, routers: list[str]) -> dict[str, Any]:
    quant = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", *routers]}
    return quant | ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}} if kv else {})


def _compressed(strategy: Strategy, static: bool, kv: str | None, routers: list[str]) -> dict[str, Any]:
    base = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    weights = base | {"strategy": strategy, "dynamic": False, "observer": "memoryless_minmax"}
    if strategy == "block":
        weights["block_structure"] = list(BLOCK)
    inputs = base | ({"strategy": "tensor", "dynamic": False} if static else {"strategy": "token", "dynamic": True})
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(["re:.*mlp\\.gate$"] if routers else [])],
        "kv_cache_scheme": base | {"strategy": kv, "dynamic": False} if kv else None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }


# ---------------------------------------------------------------------------------------------- disk


def read(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """All tensors and the config."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors, json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    return read(folder)[0]


def write(folder: Path, tensors: Tensors, config: dict[str, Any], shards: int, extra: dict[str, str]) -> Path:
    """Tensors into `shards` files with an index (one file: without), config and further files beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    size = -(-len(names) // shards)
    weight_map = {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * size : (number + 1) * size]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    write_json(folder / "config.json", config)
    for name, text in extra.items():
        (folder / name).write_text(text)
    return folder


def write_json(path: Path, content: Any) -> None:
    """JSON as the Hub's files have it."""
    path.write_text(json.dumps(content, indent=2))


def copy(folder: Path, target: Path) -> Path:
    """A checkpoint to be spoiled."""
    return Path(shutil.copytree(folder, target))
