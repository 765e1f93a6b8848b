"""What some config classes need besides small sizes: fields that contradict each other or are missing by default, and
variants with other kinds of layers."""

from __future__ import annotations

from typing import Any

_FOUR = ["sliding_attention", "full_attention"] * 2
_CONVOLUTIONS = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None}
_WIDE_GLOBAL = {"num_hidden_layers": 2, "layer_types": _FOUR[:2], "global_head_dim": 128}
_MIXED = {"mlp_layer_types": ["dense", "sparse"]}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}

OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"topk_method": "noaux_tc"},
    "deepseek_v32": {"topk_method": "noaux_tc"},
    "deepseek_ocr2": {"text_config": _MIXED | {"n_routed_experts": 4, "moe_intermediate_size": 384}},
    "diffusion_gemma": {"text_config": _WIDE_GLOBAL},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 256}},
    "gemma4": {"text_config": _WIDE_GLOBAL},
    "gemma4_text": _WIDE_GLOBAL,
    "gemma4_text:moe": _WIDE_GLOBAL
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 384}
    | {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0},
    "gemma4_text:shared": {"num_hidden_layers": 4, "layer_types": _FOUR, "global_head_dim": 128}
    | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "gemma4_unified": {"text_config": _WIDE_GLOBAL},
    "gemma4_unified_text": _WIDE_GLOBAL,
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "granite4_vision": {"text_config": {"model_type": "granite"}},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"num_hidden_layers": 4, "use_mamba_kernels": False},
    "lfm2": _CONVOLUTIONS | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": _CONVOLUTIONS | {"num_dense_layers": 2},
    "lfm2_vl": {"text_config": _CONVOLUTIONS | {"block_auto_adjust_ff_dim": False}},
    "llama:tied": {"tie_word_embeddings": True},
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},  # which vLLM asks for
    "mamba2": {"num_heads": 8},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "reformer": {"is_decoder": True},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"attention_hidden_size": 512, "attention_head_dim": 128},  # of twice the hidden size
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type, or `type:variant` -> fields of its config."""

ON_DISK: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid"},
    "glm4_moe": {"head_dim": 64},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "glm4v_moe": {"text_config": {"head_dim": 64}},
    "hy_v3": {"first_k_dense_replace": 1},
    "lfm2": {"conv_dim": 256, "conv_dim_out": 256, "conv_use_xavier_init": True},
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
}
"""Model type -> keys that config.json of released models has, vLLM needs, and transformers no longer writes."""

PREDICTORS = {"ernie4_5_moe": "model.mtp_block.0"}
"""Model type -> root of its predicting layer, where the class only says `mtp`."""
