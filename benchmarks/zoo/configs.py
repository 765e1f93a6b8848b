"""A model type in; its config with every size made small out. Rules about names of fields, not about models.

A class is asked for its default config. Every field that is known to be a size becomes small, in sub-configs likewise;
lists with an entry for each layer are cut so that every kind of layer remains; token ids are put into the vocabulary;
the sections of a multimodal rotary embedding are fitted to the head. What a class needs besides is in `OWN`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.zoo.own import OWN

HIDDEN, WIDE, EXPERT, VOCABULARY, HEAD, LAYERS = 256, 512, 384, 288, 64, 2
"""Sizes of the text decoder: multiples of 128, so that blocks of 128 x 128 fit every Linear. Matrices are not square,
and twice EXPERT is not HIDDEN, so that a transposed one does not fit."""


def _table(sizes: Mapping[int, str]) -> dict[str, int]:
    return {name: size for size, names in sizes.items() for name in names.split()}


TEXT = _table(
    {
        HIDDEN: "hidden_size d_model n_embd n_embed embed_dim emb_dim word_embed_proj_dim lru_width embedding_size "
        "dim_model attention_hidden_size max_position_embeddings n_positions n_ctx max_seq_len model_max_length "
        "seq_length max_sequence_length original_max_position original_max_position_embeddings context_length",
        WIDE: "intermediate_size ffn_hidden_size ffn_dim dff dim_ff d_ff intermediate_size_mlp dense_intermediate_size "
        "n_inner prefix_dense_intermediate_size encoder_ffn_dim decoder_ffn_dim d_inner mamba_d_ssm",
        EXPERT: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size share_expert_dim "
        "moe_shared_expert_intermediate_size moe_shared_intermediate_size shared_intermediate_size",
        128: "router_hidden_size hidden_size_per_layer_input moe_latent_size kv_lora_rank q_lora_rank o_lora_rank",
        HEAD: "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim linear_value_head_dim d_kv "
        "linear_head_dim swa_head_dim swa_v_head_dim global_head_dim attention_head_dim kv_channels index_head_dim "
        "mamba_d_head mamba_head_dim laurel_rank query_pre_attn_scalar sliding_window sliding_window_size dim_head "
        "attention_window_size window_size attention_chunk_size index_topk",
        VOCABULARY: "vocab_size vocab_size_per_layer_input padded_vocab_size",
        32: "mamba_chunk_size chunk_size rotary_dim",
        16: "mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank",
        8: "mamba_n_heads mamba_num_heads n_mamba_heads",
        4: "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads linear_num_heads "
        "encoder_attention_heads decoder_attention_heads linear_num_value_heads num_experts n_routed_experts "
        "num_local_experts moe_num_experts moe_n_experts",
        LAYERS: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers num_blocks num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads "
        "num_experts_per_tok moe_topk moe_k num_experts_per_token top_k_experts moe_top_k mamba_expand expand "
        "attn_layer_period expert_layer_period full_attention_interval index_n_heads",
        1: "n_group topk_group num_expert_group first_k_dense_replace n_groups mamba_n_groups zero_expert_num "
        "first_k_dense_layers attn_layer_offset expert_layer_offset moe_layer_freq",
        0: "num_nextn_predict_layers num_kv_shared_layers num_mtp_layers",
    }
)
"""Field of a text config -> its small value."""

TOWER = _table(
    {
        HIDDEN: "out_hidden_size output_dim text_hidden_size projector_input_dim projector_output_dim lm_hidden_size "
        "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim mlp_dim",
        128: "hidden_size embed_dim d_model projection_dim vision_output_dim hidden_dim",
        VOCABULARY: "vocab_size",
        64: "head_dim max_position_embeddings max_source_positions",
        56: "image_size",
        16: "num_position_embeddings num_mel_bins n_mel_bins",
        14: "patch_size",
        10: "n_window",
        4: "pos_emb_height pos_emb_width",
        2: "num_hidden_layers depth encoder_layers decoder_layers n_layers num_layers num_attention_heads "
        "attention_heads num_heads encoder_attention_heads decoder_attention_heads num_key_value_heads",
        1: "num_global_layers",
    }
)
"""The same for the towers of other modalities."""

AROUND = _table(
    {
        HIDDEN: "hidden_size d_model projector_hidden_size out_hidden_size projection_dim projection_intermediate_size",
        WIDE: "intermediate_size alignment_intermediate_size merged_hidden_size",
        128: "projection_hidden_size vision_hidden_size",
        VOCABULARY: "vocab_size",
        4: "num_attention_heads",
        2: "num_hidden_layers num_key_value_heads",
    }
)
"""The same for a config that holds others."""


def small_config(name: str) -> PreTrainedConfig:
    """The config of a model type, or of a variant `type:variant` of OWN. Raises whatever its class raises."""
    model_type = name.partition(":")[0]
    return CONFIG_MAPPING[model_type](**small(CONFIG_MAPPING[model_type], OWN.get(name, {}), "text"))


def small(kind: type[PreTrainedConfig], own: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Keyword arguments of a config class. `own`: fields to set besides; for a sub-config a mapping of its own.
    `role`: text, or tower."""
    default = kind()
    fields = default.to_dict()
    parts = {key: part for key, part in vars(default).items() if isinstance(part, PreTrainedConfig)}
    chosen: dict[str, Any] = {}
    for key, part in parts.items():
        inner, wanted = "text" if role == "text" and _holds_text(default, part) else "tower", own.get(key, {})
        model_type = wanted.get("model_type", part.model_type)
        chosen[key] = small(CONFIG_MAPPING[model_type] if "model_type" in wanted else type(part), wanted, inner)
        chosen[key] |= {"model_type": model_type} if model_type else {}
    sizes = TOWER if role == "tower" else AROUND if parts else TEXT
    chosen |= {key: sizes[key] for key, value in fields.items() if key in sizes and type(value) is int and value}
    if role == "text" and not parts and fields.get("head_dim", 0) is None:
        chosen["head_dim"] = HEAD
    if fields.get("num_experts_per_tok", 0) is None:
        chosen["num_experts_per_tok"] = LAYERS
    if {
        "kv_lora_rank",
        "num_key_value_heads",
        "num_attention_heads",
    } <= chosen.keys():  # latent attention has no groups
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    if "attention_multiplier" in fields:  # Granite's default of 1 makes attention a hard choice, unlike any release
        chosen["attention_multiplier"] = 1 / HEAD
    chosen |= {key: value for key, value in _token_ids(fields).items() if key not in own}
    chosen |= {key: value for key, value in own.items() if key not in parts}
    layers = next((key for key in ("num_hidden_layers", "n_layer", "num_layers") if key in fields), None)
    if layers is not None:
        chosen |= _per_layer(fields, layers, chosen, own)
    if role == "text" and not parts and "rope_parameters" not in own:
        chosen |= _rotary(kind, fields, chosen)
    return chosen


def _holds_text(config: PreTrainedConfig, part: PreTrainedConfig) -> bool:
    text = config.get_text_config(decoder=True)
    return part is text or any(value is text for value in vars(part).values())


def _per_layer(
    fields: Mapping[str, Any], key: str, chosen: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Lists with an entry for each layer, cut so that one layer of each kind remains; lists of layers likewise."""
    was = fields[key]
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == was > 2}
    lists = {name: value for name, value in lists.items() if name not in own}
    indices = {name for name, value in lists.items() if _ints(value) and value == sorted(value)}
    kinds = {name: list(dict.fromkeys(map(_frozen, lists[name]))) for name in lists.keys() - indices}
    count = own.get(key, max([chosen.get(key, LAYERS), *map(len, kinds.values())]))
    cut = {name: [values[index % len(values)] for index in range(count)] for name, values in kinds.items()}
    cut = {name: [TEXT.get(name, value) if type(value) is int else value for value in cut[name]] for name in cut}
    return cut | {name: [index for index in lists[name] if index < count] for name in indices} | {key: count}


def _ints(values: list[Any]) -> bool:
    return all(type(value) is int for value in values) and len(set(values)) == len(values)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _token_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    """Ids of special tokens, from the end of the vocabulary down."""
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    endings = ("_token_id", "_token_index", "_start_id", "_end_id")
    found = [
        key for key, value in fields.items() if key.endswith(endings) and type(value) is int and value >= VOCABULARY
    ]
    chosen = {key: VOCABULARY - 1 - index for index, key in enumerate(found) if key not in usual}
    return chosen | {key: value for key, value in usual.items() if fields.get(key) is not None}


def _rotary(kind: type[PreTrainedConfig], fields: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` with sections that add up to half of the head, where the model's code reads them."""
    modeling = kind.__module__.replace("configuration_", "modeling_")
    __import__(modeling)
    if "mrope_section" not in inspect.getsource(sys.modules[modeling]):
        return {}
    known = fields.get("rope_parameters") or {}
    if "rope_type" not in known:
        known = {"rope_type": "default", "rope_theta": 10000.0}
    head = chosen.get("head_dim", HIDDEN // chosen.get("num_attention_heads", 4))
    half = int(head * known.get("partial_rotary_factor", 1.0)) // 2
    third = half // 3 // 2 * 2
    return {"rope_parameters": dict(known) | {"mrope_section": [half - 2 * third, third, third]}}
