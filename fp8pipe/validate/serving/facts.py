"""The matrices of a checkpoint as vLLM builds them: which shards it fuses, and along which side it cuts them.

In: config.json, and names, dtypes and shapes of the tensors. Out: `Facts`. Only the decoder's layers are looked at:
towers, embeddings and the head are padded or cut by rules of their own.

Every Linear of a layer reads the hidden state, writes it, or lies between two that do. vLLM gives each rank some of the
outputs of the first kind (ColumnParallelLinear, QKVParallelLinear, MergedColumnParallelLinear) and some of the inputs
of the second (RowParallelLinear), so the hidden size and what is fused tell how a matrix is cut.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fp8pipe.model.fused import FUSED, FUSED_GATE_UP, FUSED_QKV, fused_siblings
from fp8pipe.model.headers import TensorInfo
from fp8pipe.validate.meaning.config import text_config
from fp8pipe.validate.meaning.formats import FP8, Spec
from fp8pipe.validate.meaning.names import expert_of, is_in_predictor, place_in_decoder, stays_unquantized
from fp8pipe.validate.meaning.scheme import Scheme

_WHOLE = frozenset(("q_a_proj", "kv_a_proj_with_mqa", "wq_b", "wk"))
"""Projections into latents and of the indexer, of which vLLM gives every rank the whole (ReplicatedLinear, or a merged
one with `disable_tp`): vllm/model_executor/models/deepseek_v2.py, DeepseekV2MLAAttention and Indexer."""
_QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"))
_READERS = frozenset(leaf for members in FUSED for leaf in members) - _WHOLE
"""What reads the hidden state, also where what it is usually fused with is missing."""
_CUT_TOWERS = re.compile(
    r"siglip|clip|blip|aimv2|qwen2|qwen3|glm4v|glm_ocr|ernie4_5|moonvit|kimi|paddleocr|pixtral|idefics"
)
"""Beginnings of the model types of encoders in whose attention vLLM divides the heads by the ranks, and refuses a
remainder. InternVL's stays whole instead."""
_LAST = ("down_proj", "w2", "output_linear")
"""An expert's second layer, which reads what the expert is wide."""
_DELTA = ("in_proj_qkv", "in_proj_z")
_ALIASES = {
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "encoder_attention_heads"),
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
}
"""Names that older configs have for what transformers calls by the first."""


@dataclass(frozen=True, slots=True)
class Part:
    """Output rows that vLLM cuts by themselves, such as those of k in qkv."""

    rows: int
    heads: int = 0
    """KV heads in them: ranks beyond their number share heads. 0: any row may begin a rank's share."""

    def share(self, ranks: int) -> int | None:
        """Rows of one rank; None if they cannot be cut. vllm/model_executor/layers/linear.py: QKVParallelLinear,
        and `divide` in MergedColumnParallelLinear and ColumnParallelLinear."""
        if self.heads and ranks >= self.heads:
            return self.rows // self.heads if ranks % self.heads == 0 else None
        whole = self.heads or self.rows
        return self.rows // ranks if whole % ranks == 0 else None


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight that vLLM multiplies by, fused if it fuses it."""

    name: str
    """On disk, without the layer's number; of a fused one `self_attn.(q_proj+k_proj+v_proj)`."""
    parts: tuple[Part, ...]
    """Its output rows, in vLLM's order."""
    columns: int
    cut: Literal["rows", "columns", "whole"]
    quantized: bool


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one layer."""

    name: str
    width: int
    """Between the two layers of an expert."""
    hidden: int
    quantized: bool


@dataclass(frozen=True)
class Facts:
    """All that decides how a checkpoint is served."""

    method: Literal["compressed-tensors", "fp8"]
    spec: Spec
    kv: Literal["tensor", "attn_head"] | None
    heads: int | None
    """Query heads."""
    towers: tuple[tuple[str, int], ...]
    """Encoders that vLLM cuts by their heads, `vision` or `audio`, and how many heads they have."""
    mla: bool
    model_type: str
    """Of the text model."""
    half: bool
    """The model computes in float16, not bfloat16."""
    matrices: tuple[Matrix, ...]
    """Without repetitions in other layers."""
    experts: tuple[Experts, ...]

    @property
    def powers_of_two(self) -> bool:
        """All block scales are powers of two, by quantization_config."""
        return self.spec.format.by_powers


def read_facts(config: Mapping[str, Any], scheme: Scheme, tensors: Mapping[str, TensorInfo]) -> Facts | None:
    """None for a scheme whose kernels are not known here: other formats than FP8, several groups, ModelOpt's."""
    specs = {group.spec for group in scheme.groups}
    spec = specs.pop() if len(specs) == 1 else None
    if spec is None or spec.format.codes is not FP8.codes or spec.strategy == "group":
        return None
    if scheme.method not in ("compressed-tensors", "fp8"):
        return None
    text = text_config(dict(config)) or config
    heads = _number(text, "num_attention_heads")
    layers = _layers(tensors, _number(text, "num_hidden_layers"))
    hidden = _number(text, "hidden_size") or _hidden(layers)
    known: dict[Matrix | Experts, None] = {}
    for layer in layers.values():
        known |= dict.fromkeys(_Layer(layer, hidden, heads, text).all())
    dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype") or "")
    return Facts(
        method=scheme.method,
        spec=spec,
        kv=scheme.kv,
        heads=heads,
        towers=tuple(_towers(config)),
        mla=any(name.endswith("kv_a_proj_with_mqa.weight") for layer in layers.values() for name in layer),
        model_type=str(text.get("model_type", "")),
        half=dtype.removeprefix("torch.") == "float16",
        matrices=tuple(item for item in known if isinstance(item, Matrix)),
        experts=tuple(item for item in known if isinstance(item, Experts)),
    )


def _towers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, part in config.items():
        if not isinstance(part, Mapping):
            continue
        heads = _number(part, "num_attention_heads")
        if key in ("vision_config", "audio_config") and heads and _CUT_TOWERS.match(str(part.get("model_type"))):
            yield key.removesuffix("_config"), heads
        elif key == "thinker_config":
            yield from _towers(part)


def _number(config: Mapping[str, Any], name: str) -> int | None:
    found = (config.get(key) for key in (name, *_ALIASES[name]))
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _layers(tensors: Mapping[str, TensorInfo], count: int | None) -> dict[int, dict[str, TensorInfo]]:
    """The decoder's layers: name within the layer -> tensor. Of the experts the first stands for all."""
    found: dict[int, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        expert = ".experts." in name and re.search(r"\.experts\.(\d+)\.", name)
        if expert and int(expert[1]) > 0:
            continue
        place = place_in_decoder(name)
        if place is not None and not is_in_predictor(name, count):
            found[place[0]][place[1]] = info
    return found


def _hidden(layers: Mapping[int, Mapping[str, TensorInfo]]) -> int | None:
    """The hidden size by the layers' first norm; None without one."""
    norms = (
        info.shape[0]
        for layer in layers.values()
        for name, info in layer.items()
        if re.match(r"[^.]*norm[^.]*\.weight$", name)
    )
    return next(norms, None)


def _stays(name: str, info: TensorInfo) -> bool:
    """Whether the tensor is a router, an embedding or a convolution: vLLM does not cut them as Linears."""
    return info.dtype != FP8.codes.dtype and stays_unquantized(name.removesuffix(".weight"))


def _expert(name: str) -> tuple[str, str] | None:
    """(experts module, projection) of an expert's name within a layer."""
    place = expert_of(f".{name}")
    return (place[0].removeprefix("."), place[2]) if place is not None else None


class _Layer:
    """One decoder layer's matrices."""

    def __init__(
        self, tensors: Mapping[str, TensorInfo], hidden: int | None, heads: int | None, config: Mapping[str, Any]
    ) -> None:
        self._tensors, self._hidden, self._heads, self._config = tensors, hidden, heads, config
        self._linears = {
            name.removesuffix(".weight"): info
            for name, info in tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2 and not _stays(name, info)
        }

    def all(self) -> Iterator[Matrix | Experts]:
        """Fused matrices, then single ones, then experts."""
        singles = {name: info for name, info in self._linears.items() if _expert(name) is None}
        for members in fused_siblings(singles, self._tensors):
            yield self._fused(members)
            for member in members:
                del singles[member]
        for name, info in singles.items():
            yield self._single(name, info)
        yield from self._experts()

    def _fused(self, members: tuple[str, ...]) -> Matrix:
        leaves = tuple(member.rpartition(".")[2] for member in members)
        rows = [self._linears[member].shape[0] for member in members]
        parts = tuple(Part(count) for count in rows)
        parent = members[0].rpartition(".")[0]
        if leaves == _DELTA:  # vLLM cuts q, k, v and z by themselves: layers/mamba/gdn/qwen_gdn_linear_attn.py
            key = (rows[0] - rows[1]) // 2
            parts = (Part(key), Part(key), Part(rows[1]), Part(rows[1]))
        elif any(set(leaves) <= set(known) for known in _QKV):
            size = self._head_size(parent)
            kv = tuple(Part(count, count // size if size else 0) for count in rows[1:])
            parts = (parts[0], *kv)
        name = f"{parent}.({'+'.join(leaves)})"
        cut = "whole" if set(leaves) <= _WHOLE else "rows"
        return Matrix(name, parts, self._linears[members[0]].shape[1], cut, self._is_quantized(members[0]))

    def _single(self, name: str, info: TensorInfo) -> Matrix:
        rows, columns = info.shape
        parent, _, leaf = name.rpartition(".")
        parts: tuple[Part, ...] = (Part(rows),)
        if leaf in FUSED_QKV:
            parts = self._qkv_parts(parent, rows)
        elif leaf in FUSED_GATE_UP and rows != self._hidden:
            parts = (Part(rows // 2), Part(rows // 2))
        elif leaf == "in_proj" and f"{parent}.A_log" in self._tensors:
            parts = self._state_space_parts(parent, rows, self._tensors[f"{parent}.A_log"])
        return Matrix(name, parts, columns, self._cut(name, rows, columns), self._is_quantized(name))

    def _cut(self, name: str, rows: int, columns: int) -> Literal["rows", "columns", "whole"]:
        parent, _, leaf = name.rpartition(".")
        if leaf in _WHOLE:
            return "whole"
        if rows != self._hidden or leaf in FUSED_QKV | FUSED_GATE_UP | _READERS:
            return "rows"
        # Of several square ones only the last in a block writes the hidden state: the others are fused, as q, k and v.
        others = [other for other in self._linears if other.rpartition(".")[0] == parent and other != name]
        return "columns" if columns != self._hidden or others or "." not in name else "rows"

    def _head_size(self, parent: str) -> int | None:
        """Size of the attention's heads, by what its output projection reads."""
        if not self._heads:
            return None
        for name, info in self._linears.items():
            leaf = name.rpartition(".")[2]
            if (
                name.rpartition(".")[0] == parent
                and info.shape[0] == self._hidden
                and not leaf.startswith(("q", "k", "v", "W"))
            ):
                return info.shape[1] // self._heads
        size = self._config.get("head_dim")
        return size if isinstance(size, int) else None

    def _qkv_parts(self, parent: str, rows: int) -> tuple[Part, ...]:
        size = self._head_size(parent)
        if not size or not self._heads or rows <= self._heads * size:
            return (Part(rows),)
        kv = (rows - self._heads * size) // 2
        return Part(self._heads * size), Part(kv, kv // size), Part(kv, kv // size)

    def _state_space_parts(self, parent: str, rows: int, decay: TensorInfo) -> tuple[Part, ...]:
        """x and z of Mamba; z, x, B, C and dt of Mamba 2: mamba_mixer.py and mamba_mixer2.py in
        vllm/model_executor/layers/mamba."""
        out = self._linears.get(f"{parent}.out_proj")
        groups = self._config.get("mamba_n_groups") or self._config.get("n_groups") or 1
        if len(decay.shape) != 1 or out is None or not isinstance(groups, int):
            return (Part(rows // 2), Part(rows // 2))
        width, heads = out.shape[1], decay.shape[0]
        states = (rows - 2 * width - heads) // 2
        return Part(width), Part(width), Part(states, groups), Part(states, groups), Part(heads)

    def _experts(self) -> Iterator[Experts]:
        for name, info in self._linears.items():
            place, (rows, columns) = _expert(name), info.shape
            if place is not None and place[1] in _LAST:
                yield Experts(place[0], columns, rows, self._is_quantized(name))

    def _is_quantized(self, module: str) -> bool:
        return self._linears[module].dtype == FP8.codes.dtype
