"""What a model is made of: which tensors on disk are Linear weights, experts, routers, embeddings, and what is fused.

In: a Snapshot and its Headers. Out: an `Architecture`, keyed by the names on disk. It is known, not guessed from
names: a child process (`probe.py`) builds the model on the meta device with transformers and follows transformers'
own mapping from disk to module; `rules.py` adds what vLLM's loaders forbid. The child costs 6 to 9 s, nearly all of
it imports, so its answer is kept as a record under $FP8PIPE_CACHE (default ~/.cache/fp8pipe)."""

from __future__ import annotations

from typing import Any, Literal

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
others are kept. kept_experts: in a form that vLLM serves unquantized only. outside: outside the text decoder's layers.
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
    """Transformers' name of the module that owns it; empty when it has none."""
    parameter: str = ""
    """Its attribute in that module, where several tensors share one module: gate_up_proj, down_proj, ..."""
    expert: int | None = None
    """Index of the expert it belongs to, for kind `expert`."""
    parts: tuple[int, ...] = ()
    """Rows of the shards that vLLM cuts it into, for one tensor that holds q, k and v or gate and up; else empty."""
    group: str = ""
    """Name of the group that vLLM fuses into one matrix (q/k/v, gate/up, ...); empty when it stands alone."""
    layout: ExpertLayout | None = None
    """For kind `fused_experts`."""


class AttentionLayer(Record):
    """One attention module with a KV cache."""

    name: str
    """On disk: `model.layers.0.self_attn`; KV scales are named after it."""
    module: str
    """In transformers."""
    num_kv_heads: int
    head_dim: int
    mla: bool
    """Latent attention: vLLM reads no KV scales for it."""


class Architecture(Record):
    """What the probe found. All keys and names are those on disk unless said otherwise."""

    model_class: str
    model_type: str
    transformers_version: str
    tensors: dict[str, TensorRole]
    """Every tensor of the checkpoint."""
    attention: tuple[AttentionLayer, ...]
    """In layer order; without linear attention and layers that share another layer's cache."""
    num_layers: int
    layers_module: str
    """Transformers' name of the ModuleList of decoder layers: `model.layers`."""
    tied_embeddings: bool
    """lm_head is the embedding, and has no tensor of its own."""
    trust_remote_code: bool = False
    """The model's own code was run."""
    source_quantization: dict[str, Any] | None = None
    """`quantization_config` of the source, None for an unquantized model."""
    misfits: tuple[str, ...] = ()
    """Tensors of another shape than the model's parameter, and parameters of the decoder's layers that none fills."""

    def modules(self) -> dict[str, str]:
        """Names on disk of the quantizable 2-D weights' modules -> transformers' names of the modules."""
        return {
            name.removesuffix(".weight"): role.module
            for name, role in self.tensors.items()
            if role.kind in {"linear", "expert"}
        }
