"""Makes tiny random checkpoints of real architectures, large enough that every scheme applies and every layer matters.

Hidden size 256, heads of 32 (vLLM's FP8 KV cache on CPU needs a multiple of it), every height a multiple of 128 so that
blocks fit. Weights are scaled to keep activations near one, norms and biases differ from their defaults, and routers
prefer some experts clearly.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.files import digest_of

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY = 288

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,  # with the rotary part 576, the one size that vLLM's MLA on CPU knows
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": {  # as released: vLLM's CPU kernel for the plain rotary embedding is wrong for MLA's 3-D queries
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "Mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 32}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {"head_dim": 32, **EXPERTS}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Gemma 3 text": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 32}),
    "Phi-3": ("Phi3Config", {"sliding_window": None}),
    "OPT": ("OPTConfig", {"ffn_dim": 384, "word_embed_proj_dim": 256, "num_key_value_heads": 8}),
    "DeepSeek-V2": ("DeepseekV2Config", LATENT),
    "Granite": ("GraniteConfig", {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "Granite MoE": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "OLMo 2": ("Olmo2Config", {}),
    "Qwen2-MoE": ("Qwen2MoeConfig", {"shared_expert_intermediate_size": 256, **EXPERTS}),
    "GLM-4": ("Glm4Config", {"head_dim": 32}),
    "StarCoder2": ("Starcoder2Config", {"sliding_window": None}),
    "Cohere": ("CohereConfig", {}),
    "GPT-NeoX": ("GPTNeoXConfig", {"tie_word_embeddings": False, "num_key_value_heads": 8}),
}
"""Name in the table -> transformers' config class, and settings besides SIZES. The code was written
with those up to DeepSeek-V2 in view; the rest show that it is not limited to them."""

MODELS_VERSION = 1
"""Increase it when `make` gives the same configuration other weights."""

CALIBRATION_ROWS = 64
SEED = 0


def model_key(name: str) -> str:
    """Digest of all that decides the checkpoint."""
    return digest_of([MODELS[name], SIZES, SEED, MODELS_VERSION])


def make(name: str, folder: Path) -> Path:
    """Write the checkpoint `name`, with a tokenizer, into `folder`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    class_name, own = MODELS[name]
    config = getattr(transformers, class_name)(**(SIZES | own))
    generator = torch.Generator().manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(config)
    embed = model.get_input_embeddings()
    embeddings = {id(embed.weight), id(model.get_output_embeddings().weight)}
    size = 0.75 / float(getattr(embed, "embed_scale", 1.0))  # Gemma multiplies by sqrt(hidden size)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            _fill(parameter_name, parameter, size if id(parameter) in embeddings else None, generator)
        _make_the_last_gate_matter(dict(model.named_parameters()), config.num_hidden_layers - 1)
    model = model.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.save_pretrained(folder, max_shard_size="1MB")
    _write_tokenizer(folder)
    return folder


def _fill(name: str, parameter: Tensor, embedding_size: float | None, generator: Any) -> None:  # Any: a late import
    import torch

    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() < 2:
        parameter += 0.1 * noise
    elif embedding_size is not None:
        parameter.copy_(embedding_size * noise)
    else:
        decisive = 4.0 if name.endswith(("gate.weight", "router.weight")) else 1.0
        parameter.copy_(decisive * noise / math.sqrt(parameter.shape[-1]))


def _make_the_last_gate_matter(parameters: dict[str, Tensor], last: int) -> None:
    """If a norm follows the MLP, doubling a scale cancels out in every projection but the gate, which is not linear.

    So the last MLP then gets most of the weight, and gates the range in which they are least linear."""
    norms = [name for name in parameters if f"layers.{last}.post_feedforward" in name]
    for name in norms:
        parameters[name] += 5.0
    for name, weight in parameters.items():
        if norms and name.endswith("mlp.gate_proj.weight"):
            weight *= 0.2


def _write_tokenizer(folder: Path) -> None:
    """One token per byte: transformers rebuilds the tokenizer of some architectures from the vocabulary alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def sequences(count: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids, none of them special."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (count, length), generator=generator).tolist()


def write_calibration(path: Path) -> Path:
    """Write rows of random letters, as calibration data."""
    rows = sequences(CALIBRATION_ROWS, 32, seed=1)
    path.write_text("".join("".join(chr(ord("!") + token % 94) for token in row) + "\n" for row in rows))
    return path
