"""The calibration record: ranges, where they come from, and the key by which they are reused."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fp8pipe.files import digest_of
from fp8pipe.records import Record


class KVRange(Record):
    """Ranges of one attention's cache: one value for strategy tensor, one per KV head for strategy head."""

    k_amax: tuple[float, ...]
    """Keys as cached, after rotary embedding."""
    v_amax: tuple[float, ...]

    def scaled(self, factor: float) -> KVRange:
        """All ranges multiplied by `factor`."""
        return KVRange(k_amax=tuple(k * factor for k in self.k_amax), v_amax=tuple(v * factor for v in self.v_amax))


class Sensitivity(Record):
    """What FP8 does to one Linear, estimated from some of its rows and some of its tokens. Not part of any identity.

    SQNR is the signal-to-quantization-noise ratio in dB, 10 log10(sum of squares / sum of squared errors); None where
    there is no error or no signal.
    """

    layer: str
    """Transformers' name of the decoder layer."""
    weight_sqnr_db: float | None
    output_sqnr_db: float | None
    """With weight and input in FP8, without bias."""
    weight_energy: float
    """Sum of squares of the weight."""
    output_energy: float
    """Sum of squares of the output for one token, averaged over tokens."""
    weight_saturation: float
    """Share of the weights beyond the observer's range."""
    input_saturation: float
    """Share of the input values beyond a static range; 0 for dynamic activations."""
    weight_kurtosis: float
    """Fourth moment over the square of the second: 3 for normal values, more for heavy tails."""
    input_kurtosis: float
    input_amax: float
    """Largest absolute value of its input over all tokens."""


class LayerSensitivity(Record):
    """All Linears of one layer taken together."""

    weight_sqnr_db: float | None
    output_sqnr_db: float | None


class ExpertTokens(Record):
    """How many calibration tokens one expert saw. Not part of any identity."""

    routed: int
    """Tokens that the router gave it."""
    added: int = 0
    """Tokens that it was shown in addition, because the router gave it fewer than calibration.min_expert_tokens."""


class Ranges(Record):
    """What calibration measures, by the names that modules have in the safetensors files."""

    inputs: dict[str, float] = Field(default_factory=dict)
    """Module -> amax of its input, float32. input_scale = amax / 448."""
    assumed: dict[str, str] = Field(default_factory=dict)
    """Scales whose range in `inputs` or `kv` was not measured -> why, and what was taken instead."""
    kv: dict[str, KVRange] = Field(default_factory=dict)
    """Attention module -> ranges of its cached keys and values."""
    kv_absent: dict[str, str] = Field(default_factory=dict)
    """Attention module, or layer without attention -> why it gets no KV ranges."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Weight in the checkpoint, with one scale per tensor -> its largest magnitude, float32, for quantizing to use. Not
    part of any identity, since it follows from the source."""
    sensitivity: dict[str, Sensitivity] = Field(default_factory=dict)
    """Quantized module -> what FP8 does to it."""
    layers: dict[str, LayerSensitivity] = Field(default_factory=dict)
    """Transformers' name of a decoder layer -> what FP8 does to it."""
    expert_tokens: dict[str, ExpertTokens] = Field(default_factory=dict)
    """Expert -> how many tokens it saw."""

    def joined(self, other: Ranges) -> Ranges:
        """The ranges of both; they have no module in common."""
        fields = Ranges.model_fields
        return Ranges(**{name: getattr(self, name) | getattr(other, name) for name in fields})


class Calibration(Ranges):
    """Ranges and their provenance. `FOLDER/calibration.json`."""

    key: str
    """Digest of everything that decides the ranges; equal keys, equal ranges."""
    kept: dict[str, str] = Field(default_factory=dict)
    """Source tensors that the recipe's keep_bf16 leaves unquantized -> why."""
    model_id: str
    source_commit: str
    dataset: str
    dataset_revision: str
    """Commit sha of a Hub dataset, `sha256:...` of a local file."""
    dataset_split: str
    sample_indices: tuple[int, ...]
    token_ids_sha256: str
    tokens: int
    """Number of tokens run through the model, over all samples."""
    max_seq_len: int
    seed: int
    observers: dict[str, Any]
    """inputs and kv: the recipe's observer settings; null for what needs no range."""
    device_class: str
    versions: dict[str, str]
    """torch and transformers."""
    threads: int
    """Compute threads; results differ in the last bits between thread counts."""
    instructions: str | None = None
    """The CPU's instruction set, and the 16-bit types that it can multiply; they too change the last bits."""
    seconds: float
    """How long the calibration took. Not part of any identity."""

    def digest(self) -> str:
        """sha256 of what decides the bytes of a checkpoint: the ranges, and the tensors that are kept."""
        return digest_of(self.model_dump(mode="json", include={"inputs", "kv"} | ({"kept"} if self.kept else set())))

    def scaled(self, factor: float) -> Calibration:
        """All ranges multiplied by `factor`, as a wrong calibration would have found them."""
        inputs = {name: amax * factor for name, amax in self.inputs.items()}
        kv = {name: found.scaled(factor) for name, found in self.kv.items()}
        return self.model_copy(update={"inputs": inputs, "kv": kv})
