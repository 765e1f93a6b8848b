"""Tiny random checkpoints of real architectures, made with transformers: what the engine's tests quantize."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
"""Odd on purpose: 160 is no multiple of 128, and q, k and v differ in height."""

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

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
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gpt-oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
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
}


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
    config = getattr(transformers, class_name)(**(SIZES | own | changes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_folder("qwen3")`: a folder with that tiny model, made once. Tests must not write into it."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(name: str = "llama", **changes: Any) -> Path:
        key = (name, *sorted(changes.items()))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(name), name, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session", autouse=True)
def architecture_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Architecture records of the tests go to a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FP8PIPE_CACHE", str(tmp_path_factory.mktemp("fp8pipe-cache")))
        yield
