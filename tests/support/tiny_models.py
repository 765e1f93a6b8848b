"""Tiny random checkpoints of real architectures, made with transformers, and plans and ranges for them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from fp8pipe.config import Recipe, load_recipe
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.architecture import Architecture
from fp8pipe.quantize.plan import Plan, make_plan
from fp8pipe.records.calibration import Calibration, KVRange

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
"""Deliberately uneven: 160 is not a multiple of 128, and q is taller than k and v."""

LAYERS = {"num_hidden_layers": 4}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
VISION = {"hidden_size": 32, "intermediate_size": 64, "image_size": 28, "patch_size": 14}
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS = {"num_experts": 4, **SPARSE}
ERNIE = {
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": [64, 64],
    "moe_num_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse"],
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
STEP = {"layer_types": ["full_attention"] * 2, "share_expert_dim": 32, "n_routed_experts": 4, **SPARSE}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-moe": ("Qwen3MoeConfig", {"head_dim": 32, **EXPERTS}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gemma3-text": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 32}),
    "phi3": ("Phi3Config", {"pad_token_id": 0, "sliding_window": None}),
    "opt": ("OPTConfig", {"ffn_dim": 160, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "gpt-neox": ("GPTNeoXConfig", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "biogpt": ("BioGptConfig", {}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "gptj": ("GPTJConfig", {"rotary_dim": 16, "n_inner": 160}),
    "camembert": ("CamembertConfig", {"is_decoder": True, "pad_token_id": 0}),
    "bert": ("BertConfig", {"is_decoder": True}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoeConfig", {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v2": (
        "DeepseekV2Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {**LAYERS, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
    "olmo-hybrid": ("OlmoHybridConfig", {**HYBRID, **DELTA, "pad_token_id": 0}),
    "kimi-linear": (
        "KimiLinearConfig",
        {
            **HYBRID,
            **LATENT,
            "mlp_layer_types": ["dense", "dense"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "pad_token_id": 0,
        },
    ),
    "longcat": (
        "LongcatFlashConfig",
        {
            **LATENT,
            **LAYERS,
            "q_lora_rank": 32,
            "head_dim": 16,
            "ffn_hidden_size": 160,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "moe_topk": 2,
            "zero_expert_num": 1,
        },
    ),
    "axk2": (
        "AXK2Config",
        {
            **LATENT,
            **SPARSE,
            "q_lora_rank": 32,
            "n_routed_experts": 4,
            "index_head_dim": 32,
            "index_n_heads": 2,
            "index_topk": 16,
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "deepseek-v4": (
        "DeepseekV4Config",
        {
            **SPARSE,
            "head_dim": 32,
            "q_lora_rank": 32,
            "o_lora_rank": 32,
            "qk_rope_head_dim": 32,
            "n_routed_experts": 4,
            "sliding_window": 16,
            "index_head_dim": 32,
            "index_n_heads": 2,
            "index_topk": 16,
            "num_nextn_predict_layers": 0,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "mlp_layer_types": ["moe", "moe"],
        },
    ),
    "git": ("GitConfig", {**SIZES, "vision_config": VISION | {"num_hidden_layers": 2, "num_attention_heads": 2}}),
    "hrm": ("HrmTextConfig", {"head_dim": 16}),
    "hunyuan-moe": ("HunYuanMoEV1Config", {"head_dim": 32, "num_experts": 4, "moe_topk": 2}),
    "gemma4-moe": (
        "Gemma4TextConfig",
        {
            **EXPERTS,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
            "per_layer_config": {"1": {"head_dim": 32}},
            "enable_moe_block": True,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "gemma4-shared": (
        "Gemma4TextConfig",
        {
            **LAYERS,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 32,
            "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 96,
        },
    ),
    "qwen3-vl-moe": (
        "Qwen3VLMoeConfig",
        {
            "text_config": SIZES | EXPERTS | {"head_dim": 32, "moe_intermediate_size": 64, "rope_parameters": MROPE},
            "vision_config": VISION
            | {"depth": 2, "num_heads": 2, "num_position_embeddings": 16, "out_hidden_size": 64},
        },
    ),
    "ernie-vl-moe": (
        "Ernie4_5_VLMoeConfig",
        {
            "text_config": SIZES | ERNIE | {"pad_token_id": 0, "rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}},
            "vision_config": {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2},
            "tie_word_embeddings": True,
        },
    ),
    "glm4v": (
        "Glm4vConfig",
        {
            "text_config": SIZES
            | {
                "rope_parameters": MROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0},
                "attention_bias": True,
                "pad_token_id": 0,
            },
            "vision_config": VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 64},
        },
    ),
    "step3p7": (
        "Step3p7Config",
        {
            "text_config": SIZES | STEP | {"head_dim": 32, "mlp_layer_types": ["dense", "sparse"]},
            "vision_config": VISION | {"num_hidden_layers": 1, "num_attention_heads": 2},
        },
    ),
}
"""Name -> transformers' config class, and settings beside SIZES; a model with a vision tower has both in its parts."""


def make_model(
    folder: Path,
    name: str = "llama",
    *,
    dtype: str = "bfloat16",
    shard_size: str = "60KB",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write the tiny model `name` into `folder`: weights of `dtype`, in shards of at most `shard_size`."""
    import torch
    import transformers

    class_name, own = CONFIGS[name]
    sees = "vision_config" in own
    config = getattr(transformers, class_name)(**(own if sees else SIZES | own | changes))
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config).to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


@functools.cache
def architecture_of(folder: Path) -> Architecture:
    """The architecture record, made in this process: a child's imports would cost seconds for each model."""
    from fp8pipe.oracle import transformers_probe as probe

    headers = read_headers(resolve(str(folder)))
    shapes = {info.name: list(info.shape) for info in headers.tensors.values()}
    return Architecture.model_validate(probe.examine(folder, shapes, False))


def recipe(name: str = "fp8-dynamic", **changes: Any) -> Recipe:
    """A shipped recipe with some fields changed."""
    return Recipe.model_validate(load_recipe(name).model_dump() | changes)


def plan_of(folder: Path, wanted: Recipe) -> Plan:
    """The plan for a tiny model."""
    snapshot = resolve(str(folder))
    return make_plan(snapshot, read_headers(snapshot), wanted, architecture_of(folder))


def calibration_for(plan: Plan, **changes: Any) -> Calibration:
    """Made-up ranges for everything that `plan` needs, all different."""
    heads = {output.source: output.shape[0] for output in plan.outputs if output.role == "k_scale"}
    fields: dict[str, Any] = {
        "inputs": {name: 1.5 + index / 8 for index, name in enumerate(plan.calibrated_modules())},
        "kv": {
            name: KVRange(
                k_amax=tuple(2.0 + i for i in range(heads[name])), v_amax=tuple(3.0 + i for i in range(heads[name]))
            )
            for name in plan.calibrated_attention()
        },
        "source_commit": plan.source_commit,
        "key": "test",
        "model_id": plan.model_id,
        "dataset": "test",
        "dataset_revision": "test",
        "dataset_split": "test",
        "sample_indices": (0,),
        "token_ids_sha256": "",
        "tokens": 1,
        "max_seq_len": 1,
        "seed": 0,
        "observers": {},
        "device_class": "cpu",
        "versions": {},
        "threads": 1,
        "seconds": 0.0,
    }
    return Calibration(**(fields | changes))
