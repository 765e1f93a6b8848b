"""The record of what a model is made of: which tensors are Linear weights, experts, routers, and which are fused.

An `Architecture` is not guessed from names: `oracle/transformers.py` has transformers build the model on the meta
device and follows its own mapping from tensors on disk to modules; `model/names.py` adds what vLLM's loaders forbid.
For a model that transformers does not know, vLLM builds its own, and its loader is followed.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fp8pipe.records import Record

Kind = Literal[
    "linear",
    "expert",
    "fused_experts",
    "kept_experts",
    "lm_head",
    "embedding",
    "router",
    "gate",
    "mixer",
    "outside",
    "unused",
    "conv",
    "norm",
    "bias",
    "parameter",
]
"""linear, expert (one matrix of one expert) and fused_experts (all experts in one 3-D tensor) may be quantized; the
others are kept. kept_experts: in a form that vLLM serves only unquantized. outside: outside the text decoder's layers.
unused: transformers has no such tensor (multi-token prediction)."""
QUANTIZABLE: frozenset[Kind] = frozenset(("linear", "expert", "fused_experts"))


class ExpertLayout(Record):
    """How a 3-D tensor [experts, ...] holds one or two Linear weights per expert."""

    transposed: bool
    """Each expert's matrix is [in, out] on disk, not [out, in]."""
    interleaved: bool
    """gate and up alternate along `out`, instead of one after the other."""
    projections: tuple[str, ...]
    """Names of the weights inside, in order along `out`: (gate_proj, up_proj), (down_proj,), ..."""


class TensorRole(Record):
    """What one tensor on disk is."""

    kind: Kind
    reason: str = ""
    """Why it is kept; empty for what may be quantized."""
    module: str = ""
    """transformers' name of the module that owns it; empty if none does."""
    parameter: str = ""
    """Its attribute in that module if several tensors share the module: gate_up_proj, down_proj, ..."""
    expert: int | None = None
    """Index of the expert it belongs to within `module`, for kind `expert`. The number in its name may be another:
    Ernie 4.5 VL numbers the experts for text and those for images in one row."""
    parts: tuple[int, ...] = ()
    """Rows of each shard that vLLM cuts a fused tensor (q, k and v; gate and up) into; empty for any other."""
    group: str = ""
    """Name of the group that vLLM fuses into one matrix (q/k/v, gate/up, ...); empty for a Linear of its own."""
    layout: ExpertLayout | None = None
    """How the experts are laid out; for kind `fused_experts` only."""


class AttentionLayer(Record):
    """One attention module with a KV cache of its own, or one that reads another layer's."""

    name: str
    """Its name on disk, `model.layers.0.self_attn`; KV scales are named after it."""
    module: str
    """Its name in transformers."""
    num_kv_heads: int
    head_dim: int
    mla: bool
    """Multi-head latent attention."""
    lender: str = ""
    """Name on disk of the layer whose keys and values it reads; empty for a layer with a cache of its own."""

    @property
    def has_kv_scales(self) -> bool:
        """Whether vLLM reads KV scales for it. For latent attention it drops them."""
        return not self.mla


class Architecture(Record):
    """What transformers, or else vLLM, makes of a checkpoint. Keys and names are those on disk unless a field says
    otherwise. Where vLLM answered, the names that fields call transformers' are vLLM's."""

    model_class: str
    model_type: str
    transformers_version: str
    answered_by: Literal["transformers", "vLLM"] = "transformers"
    """Whose model this is. What transformers does not know it cannot run, so that no range can be measured."""
    tensors: dict[str, TensorRole]
    """Every tensor of the checkpoint."""
    attention: tuple[AttentionLayer, ...]
    """In layer order, without linear attention; empty where vLLM answered."""
    num_layers: int
    layers_module: str
    """transformers' name of the ModuleList of decoder layers, `model.layers`."""
    tied_embeddings: bool
    """lm_head is the embedding and has no tensor of its own."""
    head: str = ""
    """transformers' name of the output head, `lm_head`, tied or not; empty if it is no Linear."""
    backend_compatible: bool = False
    """Whether transformers' class takes attention from outside, as vLLM's Transformers backend needs it to."""
    trust_remote_code: bool = False
    """Whether the model's own code was run to find all this."""
    source_quantization: dict[str, Any] | None = None
    """`quantization_config` of the source; None for an unquantized model."""
    experts: dict[str, int] = Field(default_factory=dict)
    """Experts module, by the name under which vLLM's loaders look for its experts -> how many the model has."""
    unread_experts: tuple[str, ...] = ()
    """Experts modules that transformers would leave as it initialised them if each expert had tensors of its own, as
    vLLM's loaders want them: it has no such names for this model."""
    misfits: tuple[str, ...] = ()
    """Tensors whose shape is not that of the model's parameter, and parameters of decoder layers that no tensor
    fills."""
