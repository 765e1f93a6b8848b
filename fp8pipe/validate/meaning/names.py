"""What the names of tensors and modules say: weight or scale, layer, expert, attention, tower.

Names alone are enough for the layer names that nearly all released models use.
"""

from __future__ import annotations

import re
import sys

from fp8pipe.model.headers import TensorInfo
from fp8pipe.model.predictor import predictor_of

SCALES = (
    *("weight_scale", "weight_scale_inv", "input_scale"),
    *("weight_global_scale", "input_global_scale", "weight_scale_2"),
    *("act_scale", "activation_scale"),
)
"""Leaf names of what is stored beside a quantized weight, present and former ones."""
UNWANTED = ("weight_zero_point", "input_zero_point", "weight_g_idx", "g_idx", "weight_shape")
"""The same, of schemes that vLLM's FP8 layers have no place for."""
KV_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale")
WEIGHTS = ("weight", "weight_packed")
"""Leaf names of the weight itself."""
FLOATS = ("F32", "BF16", "F16", "F64")
"""Dtypes of unquantized weights."""
FLOAT_SCALES = ("F32", "BF16", "F16")
"""Dtypes of scales that vLLM copies into float32."""

_STAYS = re.compile(
    r"(^|\.)(embed\w*|wte|wpe|shared|lm_head|score|classifier|\w*norm\w*$|\w*router\w*|gate|shared_expert_gate|conv\w*|"
    r"in_proj_ba|in_proj_a|in_proj_b|x_proj|dt_proj|weights_proj|patch_embed\w*|rel\w*|eh_proj|shared_head)(\.|$)"
)
_TOWER = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|speech\w*|sam_model|\w*projector)(\.|$)")
_NUMBERED = re.compile(r"\.\d+\.")
_ROUTER = re.compile(r"\.(gate|\w*router\w*|shared_expert_gate)$")
_LAYER = re.compile(r"(^|\.)(?:layers|transformer\.(?:h|blocks))\.(\d+)\.")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)$")
_ATTENTION = re.compile(
    r"^(.*\.(?:self_attn|attn|attention|self_attention|mixer))\."
    r"(?:[kv]_proj|qkv_proj|query_key_value|W?qkv|wqkv|W_pack|c_attn)$"
)
_KV_PLACE = re.compile(r"\.(self_attn|attn|attention|self_attention|mixer)(\.attn|\.[qkv]_proj|\.qkv_proj)?$")
"""Modules whose KV scales vLLM maps to the attention layer above them."""


# ---------------------------------------------------------------------------------------------- tensors


def split_name(name: str) -> tuple[str, str]:
    """Module and leaf of a tensor's name."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def module_of_weight(name: str) -> str | None:
    """The module whose weight the tensor is by its name; None for all others."""
    module, leaf = split_name(name)
    return module if module and leaf in WEIGHTS else None


def is_scale(name: str) -> bool:
    """Whether a tensor is by its name a scale of a weight, of inputs or of the KV cache."""
    return split_name(name)[1] in (*SCALES, *KV_SCALES)


def is_companion(name: str) -> bool:
    """Whether a tensor is by its name one that quantization adds."""
    return is_scale(name) or split_name(name)[1] in UNWANTED


def holds_codes(entry: TensorInfo) -> bool:
    """Whether a tensor is FP8 or packed FP4 and no scale; exponents (F8_E8M0) count in place of a weight only."""
    leaf = split_name(entry.name)[1]
    is_scale_of_block = leaf.endswith(("_scale", "_scale_inv", "_scale_2"))  # experts.gate_up_proj_scale_inv
    if is_scale_of_block or is_companion(entry.name):
        return False
    is_code = entry.dtype.startswith("F8_E") and (leaf in WEIGHTS or entry.dtype != "F8_E8M0")
    return is_code or leaf == "weight_packed"


# ---------------------------------------------------------------------------------------------- modules


def stays_unquantized(module: str) -> bool:
    """Whether part of the name means that vLLM has no FP8 Linear for it."""
    return _STAYS.search(module) is not None


def is_router(module: str) -> bool:
    """Whether the name is that of a router or of a shared expert's gate."""
    return _ROUTER.search(module) is not None


def expert_of(module: str) -> tuple[str, int, str] | None:
    """(experts module, expert index, projection) of a per-expert module."""
    match = _EXPERT.match(module)
    return (match[1], int(match[2]), match[3]) if match and len(match[2]) < 8 else None


def attention_of(module: str) -> str | None:
    """The attention module that a projection of keys or values belongs to."""
    match = _ATTENTION.match(module)
    return match[1] if match else None


def attention_of_kv_scale(module: str) -> str:
    """The module to which vLLM maps the KV scales stored in `module`: its attention layer, if it knows the place."""
    match = _KV_PLACE.search(module)
    return module[: match.start(2)] if match is not None and match[2] else module


def layer_of(name: str) -> int | None:
    """Number of the layer in a name, in the decoder or elsewhere."""
    match = _LAYER.search(name)
    return int(match[2]) if match and len(match[2]) < 8 else None


def place_in_decoder(name: str) -> tuple[int, str] | None:
    """(number of the decoder's layer, name within the layer); None for names outside the decoder's layers."""
    match = _LAYER.search(name)
    if match is None or len(match[2]) >= 8 or is_beside_decoder(name) or is_in_predictor(name, None):
        return None
    return int(match[2]), name[match.end() :]


def is_beside_decoder(name: str) -> bool:
    """Whether a name is in a vision or audio tower, or in the projector behind it."""
    return _TOWER.search(name) is not None


def is_in_tower(module: str) -> bool:
    """Whether a matrix is a Linear of a tower's layers or of its projector: others may be embeddings."""
    match = _TOWER.search(module)
    is_projector = match is not None and match[2].endswith("projector")
    return match is not None and "embed" not in module and (is_projector or _NUMBERED.search(f"{module}.") is not None)


def is_in_predictor(module: str, num_layers: int | None) -> bool:
    """Whether a module is in the layers that predict a second token; by its number only if `num_layers` are known."""
    return bool(predictor_of(f"{module}.", sys.maxsize if num_layers is None else num_layers))
