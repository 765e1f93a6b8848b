"""What people write, as YAML, and what it means: Recipe, EvalSuite, GatePolicy, ReleaseSpec, CollectionSpec.

Unknown keys are errors, bounds are in the types, and every message names the file and the key. A name without a slash
or suffix is looked up in `configs/`; anything else is a path. No heavy import here: a config error answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    WrapSerializer,
    field_validator,
    model_validator,
)

from fp8pipe import llmcompressor
from fp8pipe.errors import ConfigError
from fp8pipe.records import digest_of

_HERE = Path(__file__).parent
CONFIG_DIR = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"
"""The shipped configurations: inside an installed package, beside it in a checkout."""

Kind = Literal["recipes", "suites", "gates", "collections"]


class Config(BaseModel):
    """Base of everything read from YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def digest(self) -> str:
        """sha256 of the resolved content; part of identities."""
        return digest_of(self.model_dump(mode="json"))


# ---------------------------------------------------------------------------------------------- recipe


class WeightScheme(Config):
    """How Linear weights become E4M3."""

    format: Literal["e4m3"] = "e4m3"
    strategy: Literal["tensor", "channel", "block"] = "channel"
    """One scale per tensor, per output row, or per 128x128 block."""
    observer: Literal["minmax", "mse"] = "minmax"
    """minmax: scale = amax/448. mse: the shrink of amax that minimises the squared error."""
    share_scales: bool = True
    """Per-tensor only: one scale per fused group (q/k/v, gate/up), so that vLLM's requantization is the identity."""
    block_shape: tuple[int, int] = (128, 128)


class ActivationScheme(Config):
    """How the inputs of quantized Linears become E4M3."""

    mode: Literal["static", "dynamic"] = "dynamic"
    strategy: Literal["tensor", "token", "group"] = "token"
    """Static is per tensor. Dynamic is per token, per tensor, or per group of 128 (with block weights)."""
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Share of absolute values kept in range, for the percentile observer."""

    @model_validator(mode="after")
    def _static_is_per_tensor(self) -> ActivationScheme:
        if self.mode == "static" and self.strategy != "tensor":
            raise ValueError("static activations have one scale per tensor: set strategy: tensor")
        return self


class KVCacheScheme(Config):
    """How keys and values are cached."""

    strategy: Literal["tensor", "head"] = "tensor"
    """One k_scale and v_scale per layer, or one per KV head."""
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: float = Field(default=99.99, gt=50, le=100)


class CalibrationSpec(Config):
    """Where activation and KV ranges come from."""

    dataset: str = "HuggingFaceH4/ultrachat_200k"
    """Hub id, or a local .json, .jsonl, .parquet or .txt file, with a `messages` or `text` column."""
    revision: str | None = None
    subset: str | None = None
    """Hub dataset configuration, where it has several."""
    split: str = "train_sft"
    num_samples: int = Field(default=512, ge=1)
    max_seq_len: int = Field(default=2048, ge=1)
    seed: int = 42
    chat_template: Literal["model", "none"] = "model"
    """model: chat messages pass through the tokenizer's template. none: their contents are joined by newlines."""
    quantized_weights: bool = False
    """Observe activations through fake-quantized weights."""
    min_expert_tokens: int = Field(default=128, ge=0)
    """Tokens that every expert sees: one that the router gives fewer is shown others, for its range alone."""


class KeepRule(Config):
    """Which Linears stay in the source's dtype because calibration finds them sensitive."""

    worst: float = Field(gt=0, le=0.5)
    """Share of the Linears, worst output SQNR first: `2%` or 0.02. What vLLM fuses stays together, so that the last
    group taken may exceed it; at least one group is kept."""

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
    """None: weight-only."""
    kv_cache: KVCacheScheme | None = None
    """None: the cache keeps the model's dtype."""
    targets: tuple[str, ...] = ("Linear",)
    """`Linear` (every weight the architecture allows), exact module names, or `re:` patterns."""
    ignore: tuple[str, ...] = ()
    """Exact module names or `re:` patterns (match from the start) that stay in the source's dtype."""
    unmatched_ignore: Literal["error", "note"] = "error"
    """An entry of ignore that matches nothing is an error, or a note of the plan."""
    keep_bf16: KeepRule | None = None
    """The most sensitive Linears stay in the source's dtype: {worst: 2%}. Needs calibration data."""
    checkpoint_format: Literal["compressed-tensors", "fp8"] = "compressed-tensors"
    fp8_source: Literal["refuse", "requantize"] = "refuse"
    """A source that is already FP8: refuse it, or dequantize and quantize anew."""
    calibration: CalibrationSpec = CalibrationSpec()
    fallback: tuple[str | dict[str, Any], ...] = ()
    """What to try, in order, when the gate rejects this one: names of recipes, or fields to change in this one."""
    repo_suffix: str = ""
    """Ending of the published repository's name, as the field has it: -FP8, -FP8-dynamic, -FP8-KV, -FP8-block."""

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
        """Whether data must be run through the model."""
        return self.kv_cache is not None or self.keep_bf16 is not None or self.static_activations

    @property
    def static_activations(self) -> bool:
        """Whether inputs of Linears are quantized with ranges known in advance."""
        return self.activations is not None and self.activations.mode == "static"

    def identity(self) -> dict[str, Any]:
        """What decides the bytes: everything but names, descriptions, fallbacks and unused calibration settings."""
        fields = self.model_dump(
            mode="json", exclude={"name", "description", "unmatched_ignore", "fallback", "repo_suffix"}
        )
        unused = {"calibration": not self.needs_calibration, "keep_bf16": self.keep_bf16 is None}
        return {name: value for name, value in fields.items() if not unused.get(name)}


# ---------------------------------------------------------------------------------------------- suite


class TaskSpec(Config):
    """One lm-eval task of a suite."""

    num_fewshot: int = Field(default=0, ge=0)
    samples: int | None = Field(default=None, ge=1)
    """Documents to score, the first of the suite's seeded permutation; None for all."""
    documents: int | None = Field(default=None, ge=1)
    """Documents that the task has. A plan then needs no data; data that hold another number are refused."""
    subtasks: int | None = Field(default=None, ge=2)
    """Sub-tasks that a group's documents come from, named with `documents`; data with another number are refused."""
    repeat: bool = False
    """Score the baseline a second time, in other batches: the share of answers that flip is the engine's own."""

    @property
    def scored(self) -> int | None:
        """Documents that are scored, where the suite tells."""
        return self.documents if self.samples is None else self.samples

    @model_validator(mode="after")
    def _counts_fit(self) -> TaskSpec:
        if self.documents is not None and self.samples is not None and self.samples > self.documents:
            raise ValueError(f"samples: {self.samples} of {self.documents} documents; ask for no more than there are")
        if self.subtasks is not None and self.documents is None:
            raise ValueError("subtasks goes with documents: name both, or neither")
        return self


class ServingWorkload(Config):
    """What the engine is timed on: random prompts of one length, answers of one length, at most so many at a time."""

    num_prompts: int = Field(default=64, ge=1)
    input_len: int = Field(default=1024, ge=1)
    """Tokens of a prompt."""
    output_len: int = Field(default=128, ge=2)
    """Tokens of an answer; the end-of-sequence token does not end it."""
    max_concurrency: int = Field(default=16, ge=1)
    """Requests in the engine at a time."""


SAMPLE_PROMPTS = (
    "The capital of France is",
    "Water freezes at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Question: What is 12 times 7?\nAnswer:",
    "List three reasons why people plant trees:",
)
"""What both models are asked to go on from, before they are measured."""


class _TaskFile(yaml.SafeLoader):
    """lm-eval's task files have tags of their own (`!function`), of no interest here."""


_TaskFile.add_multi_constructor("!", lambda loader, tag, node: None)


def _local_data(task_file: Path) -> Iterator[Path]:
    """Files of this machine that a task's `dataset_kwargs: {data_files: ...}` names."""
    try:
        task = yaml.load(task_file.read_text(), _TaskFile)
    except (yaml.YAMLError, ValueError):
        return  # lm-eval says what is wrong with it
    settings = task.get("dataset_kwargs") if isinstance(task, dict) else None
    named = settings.get("data_files") if isinstance(settings, dict) else None
    for files in named.values() if isinstance(named, dict) else [named]:
        for file in files if isinstance(files, list) else [files]:
            if isinstance(file, str) and Path(file).is_file():
                yield Path(file)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


class EvalSuite(Config):
    """What is measured, and how; the same for baseline and candidate."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    task_dir: str | None = None
    """Folder of lm-eval task files, relative to the suite's file, for tasks that lm-eval does not ship."""
    engine: dict[str, Any] = {}
    """vLLM engine arguments for both sides: max_model_len, dtype, ..."""
    generation: dict[str, Any] = {}
    """Overrides of the tasks' generation_kwargs."""
    apply_chat_template: bool = False
    add_bos_token: bool = True
    sample_prompts: tuple[str, ...] = SAMPLE_PROMPTS
    """Prompts of the sample generation: greedy, before the tasks. Empty or repeating text is a finding."""
    serving: ServingWorkload | None = None
    """Timed after the tasks, with vLLM's benchmark code; None: not timed."""
    seed: int = 1234

    def digest(self) -> str:
        """sha256 of what is measured: the content of `task_dir` and of local data that its tasks name, not their place;
        neither description nor counts."""
        counts = {"__all__": {"documents", "subtasks"}}  # what the data are held to, not what is done with them
        content = self.model_dump(mode="json", exclude={"description": True, "task_dir": True, "tasks": counts})
        if self.task_dir is not None:
            root = Path(self.task_dir)
            files = sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
            content["task_files"] = {str(p.relative_to(root)): _sha256_of(p) for p in files}
            data = sorted({path for file in files if file.suffix == ".yaml" for path in _local_data(file)})
            if data:
                content["data_files"] = [_sha256_of(path) for path in data]
        return digest_of(content)

    @field_validator("engine")
    @classmethod
    def _engine_leaves_the_subject_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        owned = {"model", "pretrained", "tokenizer", "quantization", "kv_cache_dtype", "revision"} & set(value)
        if owned:
            raise ValueError(f"{', '.join(sorted(owned))}: fp8pipe sets these, a suite cannot")
        return value


# ---------------------------------------------------------------------------------------------- policy


def _is_unset(value: object) -> bool:
    """Left out of files and digests: a policy that does not use a newer limit stays the policy that it was."""
    return value is None


LIKELIHOODS = ("word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte")
"""Metrics of lm-eval whose samples are log-likelihoods."""


class TaskPolicy(Config):
    """What one metric of a task must show."""

    metric: str
    filter: str = "none"
    margin: float = Field(gt=0)
    """Largest drop that is still acceptable, absolute: 0.02 is two points."""
    min_baseline: float | None = None
    """The baseline must be above this, or the measurement itself is broken (chance level plus a distance)."""
    discordance: float = Field(default=0.06, gt=0, lt=1)
    """Share of answers expected to differ between BF16 and FP8. Only planning uses it: how many samples it takes."""
    spread: float | None = Field(default=None, gt=0, exclude_if=_is_unset)
    """For a graded metric, instead of `discordance`: by how much one sample's score is expected to change, as a
    standard deviation. Only planning uses it."""
    design_effect: float | None = Field(default=None, ge=1, exclude_if=_is_unset)
    """For a task of sub-tasks: how many times the variance of independent samples is expected, because damage hits some
    sub-tasks more than others; None for 1.5. Only planning uses it."""

    @field_validator("metric")
    @classmethod
    def _is_a_score(cls, value: str) -> str:
        if value in LIKELIHOODS:
            instead = "byte_perplexity" if value == "bits_per_byte" else value
            raise ValueError(
                f"{value} is a likelihood, not a score: put the task under `perplexity`, as "
                f"{{metric: {instead}, max_increase: 0.01}}"
            )
        return value


class PerplexityPolicy(Config):
    """How much less likely a text may become. Decided by a paired bootstrap over documents, beside the tasks."""

    metric: Literal["word_perplexity", "byte_perplexity", "perplexity"] = "word_perplexity"
    filter: str = "none"
    max_increase: float = Field(gt=0)
    """Largest acceptable growth, relative: 0.01 is 1 %."""
    min_baseline: float | None = None
    """The baseline must be below this, or the measurement itself is broken."""
    spread: float = Field(default=0.01, gt=0, exclude_if=lambda value: value == 0.01)
    """By how much a text's log-likelihood per unit is expected to change, in nats, as a standard deviation over texts.
    Only planning uses it."""

    @property
    def margin(self) -> float:
        """The growth as what is tested: nats per unit, the logarithm of the ratio."""
        return math.log1p(self.max_increase)


def _listed(value: Any) -> Any:  # Any: what stands in the file
    return value if isinstance(value, list | tuple) else (value,)


def _as_written(value: tuple[TaskPolicy, ...], handler: SerializerFunctionWrapHandler) -> Any:
    written = handler(value)
    return written[0] if len(written) == 1 else written


TaskPolicies = Annotated[
    tuple[TaskPolicy, ...], Field(min_length=1), BeforeValidator(_listed), WrapSerializer(_as_written)
]
"""What a task must show: one metric, or a list of several."""


class GatePolicy(Config):
    """When a candidate is good enough."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance of accepting a drop of exactly the margin, over all looks and attempts."""
    power: float = Field(default=0.8, gt=0, lt=1)
    """Chance with which an undamaged model must be accepted, or the suite is too small for the margins."""
    tasks: dict[str, TaskPolicies] = {}
    """Per task one metric, or a list of metrics; each of them must be shown."""
    perplexity: dict[str, PerplexityPolicy] = {}
    """Limits on tasks that score the likelihood of texts."""
    max_size_ratio: float | None = Field(default=None, gt=0)
    """Largest checkpoint bytes / source bytes."""
    min_speedup: float | None = Field(default=None, gt=0, exclude_if=_is_unset)
    """Least generated tokens per second / those of the baseline, on the suite's serving workload."""
    max_memory_ratio: float | None = Field(default=None, gt=0, exclude_if=_is_unset)
    """Largest bytes of weights in the engine's memory / those of the baseline."""
    looks: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    """Shares of the suite's samples at which to look; the last must be 1."""
    max_attempts: int = Field(default=3, ge=1)
    """Attempts of the fallback ladder that alpha is split over (a recipe without fallback makes one)."""
    on_inconclusive: Literal["stop", "ask"] = "stop"
    device_classes: tuple[str, ...] = ("ada", "hopper")
    """Where a verdict counts."""

    @property
    def schedule(self) -> tuple[int, ...]:
        """The numbers of the looks."""
        return tuple(range(1, len(self.looks) + 1))

    @property
    def gated(self) -> tuple[tuple[str, TaskPolicy | PerplexityPolicy], ...]:
        """Every metric that must show something, with its task."""
        several = [(name, metric) for name, metrics in self.tasks.items() for metric in metrics]
        return (*several, *self.perplexity.items())

    @property
    def gated_tasks(self) -> tuple[str, ...]:
        """The tasks whose metrics are gated."""
        return (*self.tasks, *self.perplexity)

    def label(self, task: str, limit: TaskPolicy | PerplexityPolicy) -> str:
        """The task's name, with metric and filter where several of it are gated."""
        alone = sum(name == task for name, _ in self.gated) == 1
        return task if alone else f"{task} {limit.metric},{limit.filter}"

    @property
    def serving_limits(self) -> tuple[str, ...]:
        """The limits that need serving figures."""
        return tuple(name for name in ("min_speedup", "max_memory_ratio") if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _each_metric_once(self) -> GatePolicy:
        if not self.gated:
            raise ValueError("neither tasks nor perplexity: a gate needs at least one of them")
        both = sorted(set(self.tasks) & set(self.perplexity))
        if both:
            raise ValueError(f"{', '.join(both)}: named under tasks and under perplexity; one limit per task")
        names = [f"{task} {limit.metric},{limit.filter}" for task, limit in self.gated]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: named twice; one limit per metric")
        return self

    @field_validator("looks")
    @classmethod
    def _looks_grow_to_all(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or list(value) != sorted(set(value)) or value[-1] != 1:
            raise ValueError("looks must grow and end with 1.0, e.g. [0.25, 0.5, 1.0]")
        return value


# ---------------------------------------------------------------------------------------------- release


class ReleaseSpec(Config):
    """One model, one recipe, one release: the parameter of the flow `release_model`."""

    model: str = Field(description="Hub id, Hub id@revision, or folder")
    recipe: str = Field(default="fp8-dynamic", description="Name in configs/recipes or path")
    suite: str = Field(default="quick", description="Name in configs/suites or path")
    policy: str = Field(default="quick", description="Name in configs/gates or path")
    repo_id: str = Field(description="Where to publish: namespace/name", pattern=r"^[\w.-]+/[\w.-]+$")
    collection: str | None = Field(default=None, description="Collection: namespace/title, or a slug")
    trust_remote_code: bool = Field(default=False, description="Let this model bring its own Python code")
    work_dir: str = Field(default="fp8pipe-work", description="Folder for releases and baselines")
    device: str = Field(default="auto", description="auto, cpu or cuda, for calibration")

    def resolve(self) -> ResolvedRelease:
        """Read the files that the spec names; ConfigError before anything is started, also when they do not fit."""
        resolved = ResolvedRelease(self, load_recipe(self.recipe), load_suite(self.suite), load_policy(self.policy))
        check_fit(resolved.policy, resolved.suite)
        resolved.ladder()  # a fallback that is no recipe is an error now, not after hours
        return resolved


def check_fit(policy: GatePolicy, suite: EvalSuite) -> None:
    """ConfigError when the policy gates on what the suite does not measure."""
    missing = set(policy.gated_tasks) - set(suite.tasks)
    if missing:
        raise ConfigError(
            f"policy {policy.name} gates on {', '.join(sorted(missing))}, which suite {suite.name} does not "
            f"measure; it measures {', '.join(sorted(suite.tasks))}"
        )
    if policy.serving_limits and suite.serving is None:
        raise ConfigError(
            f"policy {policy.name} limits {', '.join(policy.serving_limits)}, and suite {suite.name} times nothing; "
            "add `serving: {}` to the suite"
        )


@dataclass(frozen=True)
class ResolvedRelease:
    """A ReleaseSpec with the files it names read and checked against each other: one attempt of a release."""

    spec: ReleaseSpec
    recipe: Recipe
    suite: EvalSuite
    policy: GatePolicy
    attempt: int = 1
    attempts: int = 1
    """How many recipes the ladder holds; the policy's alpha is divided over them."""

    def ladder(self) -> tuple[ResolvedRelease, ...]:
        """The release itself and what its recipe falls back to, as many as the policy lets try.

        A fallback is published under its own ending where the repository's name has that of the first recipe.
        """
        recipes = (self.recipe, *(_fallback(self.recipe, index) for index in range(len(self.recipe.fallback))))
        recipes = recipes[: self.policy.max_attempts]
        return tuple(
            replace(self, spec=self._named_for(recipe), recipe=recipe, attempt=index + 1, attempts=len(recipes))
            for index, recipe in enumerate(recipes)
        )

    def _named_for(self, recipe: Recipe) -> ReleaseSpec:
        suffix, repo_id = self.recipe.repo_suffix, self.spec.repo_id
        if recipe.repo_suffix and suffix and repo_id.endswith(suffix):
            repo_id = repo_id.removesuffix(suffix) + recipe.repo_suffix
        return self.spec.model_copy(update={"repo_id": repo_id})


def _fallback(recipe: Recipe, index: int) -> Recipe:
    """What stands at this place of the recipe's fallback list, without a fallback of its own."""
    entry = recipe.fallback[index]
    if isinstance(entry, str):
        return load_recipe(entry).model_copy(update={"fallback": ()})
    content = recipe.model_dump(mode="json") | {"name": f"{recipe.name}-fallback-{index + 1}", "fallback": ()} | entry
    return validated(Recipe, content, f"recipe {recipe.name}, fallback {index + 1}")


class ModelEntry(Config):
    """One model of a collection."""

    id: str
    revision: str | None = None
    overrides: dict[str, Any] = {}
    """Fields of ReleaseSpec for this model alone."""


class CollectionMeta(Config):
    """The Hub collection to fill."""

    namespace: str
    title: str = Field(max_length=59)
    description: str = Field(default="", max_length=150)


class CollectionSpec(Config):
    """A list of models to release: the parameter of the flow `release_collection`."""

    collection: CollectionMeta
    models: tuple[ModelEntry, ...] = Field(min_length=1)
    recipes: tuple[str, ...] = Field(min_length=1)
    suite: str
    policy: str
    repo_name: str = "{namespace}/{model}{suffix}"
    """Where each release goes; {namespace}, {model} (the id's last part), {suffix} (the recipe's), {recipe}."""
    schedule: str | None = None
    """Cron line for the deployment; None: by hand."""
    work_dir: str = "fp8pipe-work"

    def releases(self) -> tuple[ReleaseSpec, ...]:
        """Every model with every recipe, as release specs."""
        specs = []
        for entry in self.models:
            for recipe_name in self.recipes:
                specs.append(self._release(entry, recipe_name))
        return tuple(specs)

    def _release(self, entry: ModelEntry, recipe_name: str) -> ReleaseSpec:
        recipe = load_recipe(recipe_name)
        repo_id = self.repo_name.format(
            namespace=self.collection.namespace,
            model=entry.id.rstrip("/").rsplit("/", 1)[-1],
            suffix=recipe.repo_suffix,
            recipe=recipe.name,
        )
        fields = {
            "model": entry.id if entry.revision is None else f"{entry.id}@{entry.revision}",
            "recipe": recipe_name,
            "suite": self.suite,
            "policy": self.policy,
            "repo_id": repo_id,
            "collection": f"{self.collection.namespace}/{self.collection.title}",
            "work_dir": self.work_dir,
        }
        return validated(ReleaseSpec, fields | entry.overrides, f"model {entry.id}")


# ---------------------------------------------------------------------------------------------- loading

C = TypeVar("C", bound=Config)


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or a recipe file by path, ours or one of llm-compressor's."""
    path = find("recipes", name)
    content = _read(path)
    if llmcompressor.is_recipe(content):
        content = llmcompressor.recipe_fields(content, path)
    return validated(Recipe, content, str(path))


def load_suite(name: str) -> EvalSuite:
    """A shipped suite by name, or a suite file by path; `task_dir` comes back absolute."""
    path = find("suites", name)
    suite = load(EvalSuite, "suites", name)
    if suite.task_dir is None:
        return suite
    return suite.model_copy(update={"task_dir": str((path.parent / suite.task_dir).resolve())})


def load_policy(name: str) -> GatePolicy:
    """A shipped gate policy by name, or a policy file by path."""
    return load(GatePolicy, "gates", name)


def load_collection(name: str) -> CollectionSpec:
    """A shipped collection by name, or a collection file by path."""
    return load(CollectionSpec, "collections", name)


def load(kind_class: type[C], kind: Kind, name: str) -> C:
    """Read one YAML file into its class; every failure is a ConfigError that names file and key."""
    path = find(kind, name)
    return validated(kind_class, _read(path), str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(content).__name__}")
    return content


def validated(kind_class: type[C], content: dict[str, Any], where: str) -> C:
    """`content` as `kind_class`; ConfigError with one line per problem."""
    try:
        return kind_class.model_validate(content)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(file)'}: {_explain(e)}" for e in error.errors()]
        raise ConfigError(f"{where}: not a valid {kind_class.__name__}:\n" + "\n".join(lines)) from error


def _explain(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown key (value {problem['input']!r}); remove it or correct its spelling"
    return f"{problem['msg']} (found {problem['input']!r})"


def find(kind: Kind, name: str) -> Path:
    """The file that a name or path means."""
    as_path = Path(name).expanduser()
    if "/" in name or as_path.suffix in {".yaml", ".yml"}:
        if not as_path.is_file():
            raise ConfigError(f"{name}: no such file; give a path, or one of: {', '.join(shipped(kind))}")
        return as_path
    path = CONFIG_DIR / kind / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no {kind.rstrip('s')} named {name!r}; there are: {', '.join(shipped(kind))}; or give a path"
        )
    return path


def shipped(kind: Kind) -> list[str]:
    """Names of the shipped configurations of one kind."""
    return sorted(path.stem for path in (CONFIG_DIR / kind).glob("*.yaml"))
