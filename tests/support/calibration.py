"""Tiny float32 models with a byte tokenizer, a dataset of five texts, and their calibration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from fp8pipe.calibrate import calibrate
from fp8pipe.calibrate.dataset import files_of, pin, read_rows
from fp8pipe.calibrate.samples import Samples, choose_samples, context_of
from fp8pipe.calibrate.tokenization import tokenizer_of
from fp8pipe.config import ActivationScheme, CalibrationSpec, KVCacheScheme, Recipe, WeightScheme
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.architecture import Architecture
from fp8pipe.oracle import transformers_probe as probe
from fp8pipe.progress import quiet
from fp8pipe.quantize.plan import Plan, make_plan
from fp8pipe.records import Snapshot
from fp8pipe.records.calibration import Calibration

TEXTS = [
    "the quick brown fox",
    "jumps",
    "over the lazy dog and runs far away",
    "0123456789" * 4,
    "a b c d e f g h i j k",
]

DENSE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MOE = DENSE | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "num_key_value_heads": 4,
}
MLA_V2 = MLA | {"n_shared_experts": 1, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", DENSE),
    "llama_tied": ("LlamaForCausalLM", DENSE | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", DENSE | {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", DENSE),
    "qwen3": ("Qwen3ForCausalLM", DENSE | {"head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", DENSE | {"pad_token_id": 0}),
    "opt": ("OPTForCausalLM", DENSE | {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "gemma3": ("Gemma3ForCausalLM", DENSE | SLIDING),
    "mixtral": ("MixtralForCausalLM", DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE | {"head_dim": 16}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", MOE | MLA_V2),
    "deepseek_v3": ("DeepseekV3ForCausalLM", MOE | MLA),
}

LINEAR_ATTENTION = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
SHARED_LAYERS = {
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "attention_head_dim": 32,
    "n_mamba_heads": 8,
    "mamba_headdim": 16,
    "mamba_d_state": 16,
}
LLAMA4 = {
    "head_dim": 16,
    "intermediate_size_mlp": 96,
    "intermediate_size": 32,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
}
ERNIE_VL = {
    "text_config": DENSE
    | {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": [32, 32],
        "moe_num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2},
}
BLOOM = {"vocab_size": 300, "hidden_size": 64, "n_layer": 4, "n_head": 4}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextForCausalLM", MOE | LINEAR_ATTENTION),
    "llama4": ("Llama4ForCausalLM", MOE | LLAMA4),
    "granitemoe": ("GraniteMoeForCausalLM", MOE),
    "zamba2": ("Zamba2ForCausalLM", DENSE | SHARED_LAYERS),
    "bloom": ("BloomForCausalLM", BLOOM),
    "ernie_vl": ("Ernie4_5_VLMoeForConditionalGeneration", ERNIE_VL),
}
"""Architectures that only some tests need."""

MOE_NAMES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")

STATIC_KV = Recipe(
    name="static-kv",
    activations=ActivationScheme(mode="static", strategy="tensor"),
    kv_cache=KVCacheScheme(strategy="head"),
    calibration=CalibrationSpec(dataset="unset.jsonl", num_samples=5, max_seq_len=32),
)

TENSOR_KV = STATIC_KV.model_copy(update={"weights": WeightScheme(strategy="tensor")})
"""The same with one weight scale per tensor, which experts need with static activations."""

PEER_RECIPE = TENSOR_KV.model_copy(
    update={
        "kv_cache": KVCacheScheme(),
        "calibration": STATIC_KV.calibration.model_copy(update={"max_seq_len": 64, "min_expert_tokens": 0}),
    }
)
"""What llm-compressor does when it keeps running maxima and shows experts only their own tokens."""


# ---------------------------------------------------------------------------------------------- models and data


def make_model(folder: Path, name: str, **changes: Any) -> Any:  # transformers' classes share no typed base
    """A tiny float32 model of architecture `name` with a byte tokenizer, saved in several shards."""
    class_name, settings = (ARCHITECTURES | OTHERS)[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**(settings | changes))).to(torch.float32).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="100KB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    return model


def write_dataset(path: Path, rows: Sequence[dict[str, Any]] = tuple({"text": text} for text in TEXTS)) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def with_data(recipe: Recipe, dataset: Path | str, **changes: Any) -> Recipe:
    spec = recipe.calibration.model_copy(update={"dataset": str(dataset), **changes})
    return recipe.model_copy(update={"calibration": spec})


def samples_of(model: Path, recipe: Recipe) -> Samples:
    """What calibration would run through `model`."""
    spec = recipe.calibration
    return choose_samples(spec, read_rows(files_of(spec, pin(spec))), tokenizer_of(model), context_of(model))


def planned(model: Path, recipe: Recipe, *, trust_remote_code: bool = False) -> tuple[Snapshot, Plan, Architecture]:
    """The plan, with an architecture that is examined in this process, which is faster than in a child."""
    snapshot = resolve(str(model))
    headers = read_headers(snapshot)
    shapes = {name: list(info.shape) for name, info in headers.tensors.items()}
    architecture = Architecture.model_validate(probe.examine(model, shapes, trust_remote_code))
    return snapshot, make_plan(snapshot, headers, recipe, architecture), architecture


def run_calibration(model: Path, recipe: Recipe, output: Path, progress: Any = quiet) -> Calibration:
    """Plan and calibrate, with samples that are chosen in this process, which is faster than in a child."""
    snapshot, plan, architecture = planned(model, recipe)
    samples = samples_of(model, recipe)
    return calibrate(snapshot, plan, recipe, output, architecture=architecture, samples=samples, progress=progress)


def calibrated(root: Path, recipe: Recipe) -> Calibration:
    """Calibrate the model in `root`/model on the five texts, written to `root`/data.jsonl."""
    return run_calibration(root / "model", with_data(recipe, write_dataset(root / "data.jsonl")), root / "calibration")
