"""The plan as a record, DIR/fp8pipe/plan.json: every tensor of the source and of the checkpoint."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import field_validator

from fp8pipe.config import Recipe
from fp8pipe.model.headers import TensorInfo
from fp8pipe.records import Record, Serving

Role = Literal["copy", "dequantize", "weight", "weight_scale", "input_scale", "k_scale", "v_scale"]
"""copy: the source's bytes. dequantize: an FP8 weight of the source, kept as BF16. The others: what their name says."""


class Slice(Record):
    """One Linear weight [out, in] in a 3-D tensor of experts: rows start, start + step, ... of one expert."""

    expert: int
    start: int
    step: int
    transposed: bool
    """The expert's matrix is [in, out] on disk, so that the weight's rows are its columns."""


class OutputTensor(Record):
    """One tensor of the checkpoint, and the bytes it will occupy."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    """Byte offset from the start of the file."""
    end: int
    role: Role
    source: str
    """The tensor it is made from; for KV scales the attention module's name on disk."""
    slice: Slice | None = None
    """The part of `source` it is made from; None for all of it."""
    group: str = ""
    """Weights of a group share their per-tensor weight_scale and their input_scale; empty for a weight of its own."""

    @property
    def module(self) -> str:
        """The module whose weight or scale this is."""
        return self.name.rpartition(".")[0]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.name, self.dtype, self.shape, self.shard, self.begin, self.end)


class PlannedTensor(Record):
    """One tensor of the source, and what becomes of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int
    action: Literal["quantize", "keep", "drop"]
    """drop: a scale of an FP8 source; new scales replace it."""
    reason: str
    scale: str = ""
    """For a weight of an FP8 source: the tensor with its scales."""

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.name, self.dtype, self.shape, self.shard, self.begin, self.end)


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """Tensors with the same action for the same reason."""

    action: str
    reason: str
    tensors: int
    source_bytes: int
    output_bytes: int


class Plan(Record):
    """What becomes of every tensor of the source, and every tensor of the checkpoint. `DIR/fp8pipe/plan.json`."""

    model_id: str
    source_commit: str
    recipe: str
    """The recipe's name."""
    settings: Recipe
    tensors: tuple[PlannedTensor, ...]
    """The source's tensors, in the order of shards and bytes."""
    outputs: tuple[OutputTensor, ...]
    """The checkpoint's tensors, in the order of shards and bytes."""
    source_block: tuple[int, int] | None = None
    """Rows and columns under one scale of an FP8 source in blocks; None for any other source."""
    quantization_config: dict[str, Any]
    """`quantization_config` of the checkpoint's config.json."""
    source_bytes: int
    """Size of the source's safetensors files."""
    output_bytes: int
    """Size of the checkpoint's safetensors files."""
    trust_remote_code: bool = False
    """The model's own code was run to find its architecture, and is copied to the checkpoint."""
    notes: tuple[str, ...] = ()
    """What a user should know but need not act on."""
    serving: Serving | None = None
    """What will serve the checkpoint; None for a plan that was not asked."""

    @field_validator("settings", mode="before")
    @classmethod
    def _scales_were_exact(cls, settings: Any) -> Any:
        """A recipe that was recorded before `weights.scales` existed has exact scales, in blocks too."""
        if isinstance(settings, dict) and isinstance(weights := settings.get("weights"), dict):
            return settings | {"weights": {"scales": "exact"} | weights}
        return settings

    def summary(self) -> tuple[SummaryRow, ...]:
        """Counts and bytes by action and reason, quantized first, then by size."""
        sizes: Counter[str] = Counter()
        added: list[tuple[int, int]] = []
        for output in self.outputs:
            if output.role in {"k_scale", "v_scale"}:
                added.append((0, output.end - output.begin))
            else:
                sizes[output.source] += output.end - output.begin
        rows: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for tensor in self.tensors:
            rows[tensor.action, tensor.reason].append((tensor.end - tensor.begin, sizes[tensor.name]))
        if added:
            rows["add", "k_scale and v_scale of the KV cache"] = added
        made = [
            SummaryRow(action, reason, len(found), sum(before for before, _ in found), sum(after for _, after in found))
            for (action, reason), found in rows.items()
        ]
        return tuple(sorted(made, key=lambda row: (row.action != "quantize", -row.source_bytes, row.reason)))

    def work_digest(self) -> str:
        """sha256 of which tensors are read and written where. Reasons, notes and config.json do not count."""
        places = {"name", "dtype", "shape", "shard", "begin", "end", "scale"}
        wanted = {"outputs": True, "tensors": {"__all__": places}, "source_block": True}
        return hashlib.sha256(self.model_dump_json(include=wanted).encode()).hexdigest()

    def calibrated_modules(self) -> tuple[str, ...]:
        """Names on disk of the modules whose input range the recipe needs; empty for dynamic activations."""
        return tuple(output.module for output in self.outputs if output.role == "input_scale")

    def calibrated_attention(self) -> tuple[str, ...]:
        """Names on disk of the attention modules whose KV range the recipe needs."""
        return tuple(dict.fromkeys(output.source for output in self.outputs if output.role == "k_scale"))

    def shards(self) -> dict[str, tuple[OutputTensor, ...]]:
        """File name -> its tensors, in the order of their bytes."""
        found: dict[str, list[OutputTensor]] = {}
        for output in self.outputs:
            found.setdefault(output.shard, []).append(output)
        return {name: tuple(outputs) for name, outputs in found.items()}
