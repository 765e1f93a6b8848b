"""A gate policy: when a candidate is good enough."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WrapSerializer,
    field_validator,
    model_validator,
)

from fp8pipe.config.base import Config
from fp8pipe.config.files import load


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
    tasks: dict[str, TaskPolicies] = Field(default={})
    """Per task one metric, or a list of metrics; each of them must be shown."""
    perplexity: dict[str, PerplexityPolicy] = Field(default={})
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
    def look_numbers(self) -> tuple[int, ...]:
        """1, 2, ... one for each look."""
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
        limits = {"min_speedup": self.min_speedup, "max_memory_ratio": self.max_memory_ratio}
        return tuple(name for name, limit in limits.items() if limit is not None)

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


def load_policy(name: str) -> GatePolicy:
    """A shipped gate policy by name, or a policy file by path."""
    return load(GatePolicy, "gates", name)
