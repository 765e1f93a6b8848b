"""The calibration record: ranges, where they come from, and what must be equal for them to be reused."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fp8pipe.records import Record, digest_of


class KVRange(Record):
    """Ranges of one attention's cache: one entry for strategy tensor, one per KV head for strategy head."""

    k_amax: tuple[float, ...]
    """Keys as cached, after rotary embedding."""
    v_amax: tuple[float, ...]

    def scaled(self, factor: float) -> KVRange:
        """All ranges multiplied by `factor`."""
        return KVRange(k_amax=tuple(k * factor for k in self.k_amax), v_amax=tuple(v * factor for v in self.v_amax))


class InputStatistics(Record):
    """What was seen at the input of one quantized module. A description, not identity."""

    amax: float
    """Largest absolute value, whatever the observer made of it."""
    mean_amax: float
    """Mean over samples of each sample's largest absolute value."""


class ExpertTokens(Record):
    """How many calibration tokens one expert saw. A description, not identity."""

    routed: int
    """Tokens that the router gave it."""
    added: int = 0
    """Tokens that it was shown besides, because the router gave it fewer than calibration.min_expert_tokens."""


class Ranges(Record):
    """What calibration measures, by the names that modules have in the safetensors files."""

    inputs: dict[str, float] = Field(default_factory=dict)
    """Module -> amax of its input, float32. input_scale = amax / 448."""
    kv: dict[str, KVRange] = Field(default_factory=dict)
    """Attention module -> ranges of its cached keys and values."""
    kv_absent: dict[str, str] = Field(default_factory=dict)
    """Attention module -> why it gets no KV ranges."""
    statistics: dict[str, InputStatistics] = Field(default_factory=dict)
    expert_tokens: dict[str, ExpertTokens] = Field(default_factory=dict)
    """Expert -> tokens it saw."""

    def joined(self, other: Ranges) -> Ranges:
        """Both together; their modules are disjoint."""
        return Ranges(
            inputs=self.inputs | other.inputs,
            kv=self.kv | other.kv,
            kv_absent=self.kv_absent | other.kv_absent,
            statistics=self.statistics | other.statistics,
            expert_tokens=self.expert_tokens | other.expert_tokens,
        )


class Calibration(Ranges):
    """Ranges and their provenance. `FOLDER/calibration.json`."""

    key: str
    """Digest of everything that decides the ranges; equal keys, equal ranges."""
    model_id: str
    source_commit: str
    dataset: str
    dataset_revision: str
    """Commit sha of a Hub dataset, `sha256:...` of a local file."""
    dataset_split: str
    sample_indices: tuple[int, ...]
    token_ids_sha256: str
    tokens: int
    """Tokens run through the model, over all samples."""
    max_seq_len: int
    seed: int
    observers: dict[str, Any]
    """inputs and kv: observer settings of the recipe; null for what was not observed."""
    device_class: str
    versions: dict[str, str]
    """torch, transformers."""
    threads: int
    """Compute threads; results differ in the last bits between thread counts."""
    seconds: float
    """A figure for people, not identity."""

    def digest(self) -> str:
        """sha256 of what decides the bytes of a checkpoint: the ranges."""
        return digest_of(self.model_dump(mode="json", include={"inputs", "kv"}))

    def scaled(self, factor: float) -> Calibration:
        """All ranges multiplied by `factor`: what a wrong calibration would have found."""
        inputs = {name: amax * factor for name, amax in self.inputs.items()}
        kv = {name: found.scaled(factor) for name, found in self.kv.items()}
        return self.model_copy(update={"inputs": inputs, "kv": kv})
