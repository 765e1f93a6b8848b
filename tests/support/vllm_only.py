"""Tiny random checkpoints of models that vLLM knows and transformers does not, named as vLLM's loaders read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]

CHATGLM: dict[str, Any] = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "torch_dtype": "bfloat16",
    "num_layers": 2,
    "padded_vocab_size": 128,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "kv_channels": 32,
    "num_attention_heads": 4,
    "seq_length": 128,
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "original_rope": True,
    "tie_word_embeddings": False,
}
STEP3: dict[str, Any] = {
    "architectures": ["Step3TextForCausalLM"],
    "model_type": "step3_text",
    "torch_dtype": "bfloat16",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "moe_intermediate_size": 128,
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "share_expert_dim": 128,
    "share_q_dim": 128,
    "head_dim": 32,
    "moe_layers_enum": "1",
    "max_position_embedding": 128,
    "tie_word_embeddings": False,
}
KIMI: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "torch_dtype": "bfloat16",
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def chatglm_shapes() -> Shapes:
    """q, k and v in one tensor, gate and up in another; a head and an embedding with names of their own."""
    shapes: Shapes = {
        "transformer.embedding.word_embeddings.weight": (128, 128),
        "transformer.encoder.final_layernorm.weight": (128,),
        "transformer.output_layer.weight": (128, 128),
    }
    for layer in range(2):
        at = f"transformer.encoder.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (128,),
            f"{at}.self_attention.query_key_value.weight": (256, 128),
            f"{at}.self_attention.query_key_value.bias": (256,),
            f"{at}.self_attention.dense.weight": (128, 128),
            f"{at}.post_attention_layernorm.weight": (128,),
            f"{at}.mlp.dense_h_to_4h.weight": (512, 128),
            f"{at}.mlp.dense_4h_to_h.weight": (128, 256),
        }
    return shapes


def step3_shapes() -> Shapes:
    """Experts in 3-D tensors, one for each projection, beside a router and a shared expert."""
    shapes = _ends()
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= _norms(at) | {
            f"{at}.self_attn.q_proj.weight": (128, 128),
            f"{at}.self_attn.k_proj.weight": (32, 128),
            f"{at}.self_attn.v_proj.weight": (32, 128),
            f"{at}.self_attn.inter_norm.weight": (128,),
            f"{at}.self_attn.wq.weight": (128, 128),
            f"{at}.self_attn.o_proj.weight": (128, 128),
        }
    shapes |= _mlp("model.layers.0.mlp", 256) | _mlp("model.layers.1.share_expert", 128)
    experts = {f"model.layers.1.moe.{leaf}.weight": (4, 128, 128) for leaf in ("gate_proj", "up_proj", "down_proj")}
    return shapes | experts | {"model.layers.1.moe.gate.weight": (4, 128)}


def kimi_shapes() -> Shapes:
    """Latent attention, one tensor per expert and projection, a router and a shared expert."""
    shapes = _ends()
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= _norms(at) | {
            f"{at}.self_attn.q_a_proj.weight": (128, 128),
            f"{at}.self_attn.q_a_layernorm.weight": (128,),
            f"{at}.self_attn.q_b_proj.weight": (4 * 96, 128),
            f"{at}.self_attn.kv_a_proj_with_mqa.weight": (160, 128),
            f"{at}.self_attn.kv_a_layernorm.weight": (128,),
            f"{at}.self_attn.kv_b_proj.weight": (4 * 128, 128),
            f"{at}.self_attn.o_proj.weight": (128, 256),
        }
    shapes |= _mlp("model.layers.0.mlp", 256) | _mlp("model.layers.1.mlp.shared_experts", 128)
    for expert in range(4):
        shapes |= _mlp(f"model.layers.1.mlp.experts.{expert}", 128)
    router = "model.layers.1.mlp.gate"
    return shapes | {f"{router}.weight": (4, 128), f"{router}.e_score_correction_bias": (4,)}


def _ends() -> Shapes:
    return {"model.embed_tokens.weight": (128, 128), "model.norm.weight": (128,), "lm_head.weight": (128, 128)}


def _norms(at: str) -> Shapes:
    return {f"{at}.input_layernorm.weight": (128,), f"{at}.post_attention_layernorm.weight": (128,)}


def _mlp(at: str, width: int) -> Shapes:
    up = {f"{at}.{leaf}.weight": (width, 128) for leaf in ("gate_proj", "up_proj")}
    return up | {f"{at}.down_proj.weight": (128, width)}


MODELS = {
    "chatglm": (CHATGLM, chatglm_shapes()),
    "step3": (STEP3, step3_shapes()),
    "kimi": (KIMI, kimi_shapes()),
}


def make_vllm_only(folder: Path, name: str) -> Path:
    """Write config.json and one safetensors file of random bf16 weights."""
    config, shapes = MODELS[name]
    generator = torch.Generator().manual_seed(1)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {key: (0.02 * torch.randn(shape, generator=generator)).bfloat16() for key, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
