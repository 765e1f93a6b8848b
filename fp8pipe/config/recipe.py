"""A recipe: what becomes of a model's weights, activations and KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fp8pipe.config import llmcompressor
from fp8pipe.config.base import Config
from fp8pipe.config.files import _read, find, validated


class WeightScheme(Config):
    """How Linear weights are quantized to E4M3."""

    format: Literal["e4m3"] = "e4m3"
    strategy: Literal["tensor", "channel", "block"] = "channel"
    """One scale per tensor, per output row, or per block of `block_shape`."""
    observer: Literal["minmax", "mse"] = "minmax"
    """minmax: the range is amax. mse: amax is shrunk to where the squared error is smallest. scale = range / 448."""
    share_scales: bool = True
    """One scale per fused group (q/k/v, gate/up), so that vLLM has nothing to requantize. Strategy tensor only."""
    block_shape: tuple[int, int] = (128, 128)
    """Rows and columns of a block. Strategy block only."""
    scales: Literal["exact", "power_of_two"] = "exact"
    """exact: as the observer's range gives them. power_of_two: rounded up, so that vLLM has nothing to requantize for
    DeepGEMM; strategy block only, and its default."""

    @model_validator(mode="before")
    @classmethod
    def _powers_of_two_for_blocks(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("strategy") == "block":
            return {"scales": "power_of_two"} | content
        return content

    @model_validator(mode="after")
    def _powers_of_two_only_for_blocks(self) -> WeightScheme:
        if self.scales == "power_of_two" and self.strategy != "block":
            raise ValueError(
                f"scales: power_of_two goes with strategy: block, found strategy: {self.strategy}; vLLM takes other "
                "scales as they are, so rounding them would only cost accuracy: set scales: exact"
            )
        return self

    @property
    def power_of_two(self) -> bool:
        """Whether scales are rounded up to powers of two."""
        return self.scales == "power_of_two"


class ActivationScheme(Config):
    """How the inputs of quantized Linears are quantized to E4M3."""

    mode: Literal["static", "dynamic"] = "dynamic"
    strategy: Literal["tensor", "token", "group"] = "token"
    """Static: per tensor. Dynamic: per token, per tensor, or (with block weights) per group of 128."""
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Percentage of absolute values that stay in range, for the percentile observer."""

    @model_validator(mode="after")
    def _static_is_per_tensor(self) -> ActivationScheme:
        if self.mode == "static" and self.strategy != "tensor":
            raise ValueError("static activations have one scale per tensor: set strategy: tensor")
        return self


class KVCacheScheme(Config):
    """How cached keys and values are quantized."""

    strategy: Literal["tensor", "head"] = "tensor"
    """One k_scale and v_scale per layer, or one per KV head."""
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: float = Field(default=99.99, gt=50, le=100)


LOCAL_DATA = (".json", ".jsonl", ".parquet", ".txt")
"""How the names of local datasets end."""


def is_local_data(dataset: str) -> bool:
    """Whether a dataset's name is that of a file rather than a Hub id."""
    return dataset.endswith(LOCAL_DATA)


def dataset_name(dataset: str) -> str:
    """A dataset as records and cards name it: its Hub id, or a file's name without the folder that it lies in."""
    return Path(dataset).name if is_local_data(dataset) else dataset


class CalibrationSpec(Config):
    """Where activation and KV ranges come from."""

    dataset: str = "HuggingFaceH4/ultrachat_200k"
    """Hub id, or a local file (LOCAL_DATA), with a `messages` or `text` column."""
    revision: str | None = None
    subset: str | None = None
    """Configuration of a Hub dataset that has several."""
    split: str = "train_sft"
    num_samples: int = Field(default=512, ge=1)
    max_seq_len: int = Field(default=2048, ge=1)
    seed: int = 42
    chat_template: Literal["model", "none"] = "model"
    """model: apply the tokenizer's chat template to messages. none: join their contents with newlines."""
    quantized_weights: bool = False
    """Run calibration through quantized and dequantized weights, and observe what those produce."""
    min_expert_tokens: int = Field(default=128, ge=0)
    """Fewest tokens per expert. An expert that the router gives fewer also sees others, only to measure its range."""


class KeepRule(Config):
    """Which Linears stay in the source's dtype because calibration finds them sensitive."""

    worst: float = Field(gt=0, le=0.5)
    """Share of the Linears to keep, worst output SQNR first: `2%` or 0.02. Layers that vLLM fuses are kept together, so
    the last group may exceed the share; at least one group is kept."""

    @field_validator("worst", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        text = str(value).strip()
        if not text.endswith("%"):
            return value
        try:
            return round(float(text[:-1]) / 100, 12)
        except ValueError as error:
            raise ValueError("expected a share such as 2% or 0.02") from error


class Recipe(Config):
    """What becomes of a model's weights, activations and KV cache."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    weights: WeightScheme = WeightScheme()
    activations: ActivationScheme | None = ActivationScheme()
    """None: weights only."""
    kv_cache: KVCacheScheme | None = None
    """None: the cache keeps the model's dtype."""
    targets: tuple[str, ...] = ("Linear",)
    """`Linear` (every weight the architecture allows), exact module names, or `re:` patterns."""
    ignore: tuple[str, ...] = ()
    """Exact module names or `re:` patterns (match from the start) that stay in the source's dtype."""
    unmatched_ignore: Literal["error", "note"] = "error"
    """Whether an ignore entry that matches nothing is an error or a note in the plan."""
    keep_bf16: KeepRule | None = None
    """Keep the most sensitive Linears in the source's dtype: {worst: 2%}. Needs calibration data."""
    checkpoint_format: Literal["compressed-tensors", "fp8"] = "compressed-tensors"
    fp8_source: Literal["refuse", "requantize"] = "refuse"
    """What to do with a source that is already FP8: refuse it, or dequantize and quantize it again."""
    calibration: CalibrationSpec = CalibrationSpec()
    fallback: tuple[str | dict[str, Any], ...] = ()
    """What to try next, in order, when the gate rejects this recipe: recipe names, or fields to change in this one."""
    repo_suffix: str = ""
    """Ending of the published repository's name. Customary: -FP8, -FP8-dynamic, -FP8-KV, -FP8-block."""

    @model_validator(mode="after")
    def _format_can_spell_it(self) -> Recipe:
        acts, weights = self.activations, self.weights
        if self.checkpoint_format == "fp8" and weights.strategy == "channel":
            raise ValueError(
                "checkpoint_format fp8 has no per-channel scales: use tensor, block, or compressed-tensors"
            )
        if self.checkpoint_format == "fp8" and acts is None:
            raise ValueError("checkpoint_format fp8 needs an activation scheme: static or dynamic")
        if self.checkpoint_format == "fp8" and self.kv_cache is not None and self.kv_cache.strategy != "tensor":
            raise ValueError("checkpoint_format fp8 has one KV scale per layer: set kv_cache.strategy: tensor")
        if weights.strategy == "block" and acts is not None and acts.mode == "static":
            raise ValueError("block weights take dynamic activations: vLLM has no kernel for block with static")
        if weights.strategy == "block" and acts is None:
            raise ValueError("block weights need dynamic activations: vLLM's loader asserts on block weights alone")
        if acts is not None and acts.strategy == "group" and weights.strategy != "block":
            raise ValueError("activations per group of 128 go with block weights")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether data must run through the model."""
        return self.kv_cache is not None or self.keep_bf16 is not None or self.static_activations

    @property
    def static_activations(self) -> bool:
        """Whether the inputs of Linears are quantized with calibrated scales."""
        return self.activations is not None and self.activations.mode == "static"

    def without_paths(self) -> Recipe:
        """The recipe as it is published: a path of the machine that used it is nobody's business, and no identity."""
        named = self.calibration.model_copy(update={"dataset": dataset_name(self.calibration.dataset)})
        return self.model_copy(update={"calibration": named, "fallback": tuple(map(_without_paths, self.fallback))})

    def identity(self) -> dict[str, Any]:
        """What decides the bytes: all fields but names, descriptions, fallbacks, the folder of a local dataset and
        unused calibration settings."""
        fields = self.model_dump(
            mode="json", exclude={"name", "description", "unmatched_ignore", "fallback", "repo_suffix"}
        )
        fields["calibration"]["dataset"] = dataset_name(self.calibration.dataset)
        unused = {"calibration": not self.needs_calibration, "keep_bf16": self.keep_bf16 is None}
        return {name: value for name, value in fields.items() if not unused.get(name)}


def _without_paths(step: str | dict[str, Any]) -> str | dict[str, Any]:
    """A step of a fallback, its recipe file or dataset without the folder that it lies in."""
    if isinstance(step, str):
        return Path(step).name
    data = step.get("calibration")
    if not isinstance(data, dict) or not isinstance(data.get("dataset"), str):
        return step
    return step | {"calibration": data | {"dataset": dataset_name(data["dataset"])}}


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or a recipe file by path, in our format or llm-compressor's."""
    path = find("recipes", name)
    content = _read(path)
    if llmcompressor.is_recipe(content):
        content = llmcompressor.recipe_fields(content, path)
    return validated(Recipe, content, str(path))
