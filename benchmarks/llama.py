"""Makes the synthetic models that benchmarks quantize, in a process of its own so that its memory is not counted.

python -m benchmarks.llama llama FOLDER LAYERS [--tiny]     a Llama as large as a small real one, in five shards
python -m benchmarks.llama giant FOLDER ELEMENTS            two weights of ELEMENTS each, in a sparse file"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NUM_SHARDS = 5

SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 32000
TINY = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}


def main() -> None:
    what, folder, size, *options = sys.argv[1:]
    if what == "giant":
        make_giant(Path(folder), int(size))
    else:
        make_llama(Path(folder), int(size), TINY if "--tiny" in options else SIZES)


def make_llama(folder: Path, num_layers: int, sizes: Mapping[str, int] = SIZES) -> Path:
    """Write the model into `folder`; 2.1 GB at 16 layers of the default sizes."""
    import torch
    from safetensors.torch import save_file

    config = llama_config(num_layers, sizes)
    shapes = llama_shapes(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, generator, weight_map = list(shapes), torch.Generator().manual_seed(0), {}
    for shard in range(NUM_SHARDS):
        file = f"model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        mine = names[shard * len(names) // NUM_SHARDS : (shard + 1) * len(names) // NUM_SHARDS]
        tensors = {name: (torch.randn(shapes[name], generator=generator) * 0.02).bfloat16() for name in mine}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    os.sync()
    return folder


def llama_config(num_layers: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Content of config.json, with tied embeddings."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": num_layers,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
        **sizes,
    }


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, in the model's order."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (narrow, hidden) for name in "kv"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,)}


def make_giant(folder: Path, elements: int) -> Path:
    """Write an OPT of one layer whose two feed-forward weights have `elements` each, one very tall, one very wide.

    Its file is sparse and takes no disk. All weights are zero, which makes no difference to memory."""
    from fp8pipe.model.headers import header_bytes, lay_out

    hidden, words, positions = 2048, 512, 64
    inner = elements // hidden
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "vocab_size": words,
        "max_position_embeddings": positions,
        "torch_dtype": "bfloat16",
        "pad_token_id": 1,
    }
    layer = "model.decoder.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (words, hidden),
        "model.decoder.embed_positions.weight": (positions + 2, hidden),
        f"{layer}.fc1.weight": (inner, hidden),
        f"{layer}.fc1.bias": (inner,),
        f"{layer}.fc2.weight": (hidden, inner),
        f"{layer}.fc2.bias": (hidden,),
    }
    shapes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "k", "v", "out")}
    norms = (f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm", "model.decoder.final_layer_norm")
    shapes |= {f"{layer}.self_attn.{name}_proj.bias": (hidden,) for name in ("q", "k", "v", "out")}
    shapes |= {f"{norm}.{leaf}": (hidden,) for norm in norms for leaf in ("weight", "bias")}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    placed = lay_out("model.safetensors", [(name, "BF16", shape) for name, shape in shapes.items()])
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header_bytes(placed, placed[0].begin))
        file.truncate(placed[-1].end)
    return folder


if __name__ == "__main__":
    main()
