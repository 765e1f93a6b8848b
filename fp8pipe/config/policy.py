"""A gate policy: when a candidate is good enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """Whether a newer limit is unused. It is then left out of digests, so that older policies keep their identity."""
    return value is None


LIKELIHOODS = ("word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte")
"""lm-eval metrics whose samples are log-likelihoods."""


def look_sizes(total: int, looks: Sequence[float]) -> tuple[int, ...]:
    """Samples scored by the end of each look, when `total` are scored in all. A share is rounded up."""
    return tuple(math.ceil(total * share) for share in looks)


class TaskPolicy(Config):
    """The limit for one metric of a task."""

    metric: str
    filter: str = "none"
    margin: float = Field(gt=0)
    """Smallest drop that is unacceptable, absolute: 0.02 is two points."""
    min_baseline: float | None = None
    """The baseline must exceed this (chance level and some more), or the measurement itself is broken."""
    discordance: float = Field(default=0.06, gt=0, lt=1)
    """Share of answers expected to differ between BF16 and FP8. Used only to plan how many samples are needed."""
    spread: float | None = Field(default=None, gt=0, exclude_if=_is_unset)
    """Expected standard deviation of the change of one sample's score, for graded metrics, instead of `discordance`.
    Used only to plan."""
    design_effect: float | None = Field(default=None, ge=1, exclude_if=_is_unset)
    """Expected variance of a task made of sub-tasks, relative to independent samples; damage hits some harder than
    others. None means 1.5. Used only to plan."""

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
    """How much less likely a text may become; decided by a paired bootstrap over documents."""

    metric: Literal["word_perplexity", "byte_perplexity", "perplexity"] = "word_perplexity"
    filter: str = "none"
    max_increase: float = Field(gt=0)
    """Smallest unacceptable increase, relative: 0.01 is 1 %."""
    min_baseline: float | None = None
    """The baseline must be below this, or the measurement itself is broken."""
    spread: float = Field(default=0.01, gt=0, exclude_if=lambda value: value == 0.01)
    """Expected standard deviation, over texts, of the change of the log-likelihood per unit, in nats. Used only to
    plan."""

    @property
    def margin(self) -> float:
        """The increase as it is tested: nats per unit, the logarithm of the ratio."""
        return math.log1p(self.max_increase)


def _listed(value: Any) -> Any:  # Any: what stands in the file
    return value if isinstance(value, list | tuple) else (value,)


def _as_written(value: tuple[TaskPolicy, ...], handler: SerializerFunctionWrapHandler) -> Any:
    written = handler(value)
    return written[0] if len(written) == 1 else written


TaskPolicies = Annotated[
    tuple[TaskPolicy, ...], Field(min_length=1), BeforeValidator(_listed), WrapSerializer(_as_written)
]
"""Limits for a task: one metric, or a list of several."""


class GatePolicy(Config):
    """When a candidate is good enough."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Probability of accepting a drop of exactly the margin, over all looks and attempts."""
    power: float = Field(default=0.8, gt=0, lt=1)
    """Probability with which an undamaged model must be accepted, or the suite is too small for the margins."""
    tasks: dict[str, TaskPolicies] = Field(default={})
    """Per task, the limit for one metric or for each of several."""
    perplexity: dict[str, PerplexityPolicy] = Field(default={})
    """Limits for tasks that score the likelihood of texts."""
    max_size_ratio: float | None = Field(default=None, gt=0)
    """Largest ratio of checkpoint bytes to source bytes."""
    min_speedup: float | None = Field(default=None, gt=0, exclude_if=_is_unset)
    """Smallest ratio of generated tokens per second to the baseline's, on the suite's serving workload."""
    max_memory_ratio: float | None = Field(default=None, gt=0, exclude_if=_is_unset)
    """Largest ratio of the weights' bytes in the engine's memory to the baseline's."""
    looks: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    """Shares of the suite's samples after which to decide; the last must be 1."""
    max_attempts: int = Field(default=3, ge=1)
    """Most attempts of a fallback ladder. Alpha is split over the attempts that the recipe allows."""
    on_inconclusive: Literal["stop", "ask"] = "stop"
    device_classes: tuple[str, ...] = ("ada", "hopper")
    """Classes of devices on which a verdict counts."""

    @property
    def gated(self) -> tuple[tuple[str, TaskPolicy | PerplexityPolicy], ...]:
        """Every limit, with its task."""
        several = [(name, metric) for name, metrics in self.tasks.items() for metric in metrics]
        return (*several, *self.perplexity.items())

    @property
    def gated_tasks(self) -> tuple[str, ...]:
        """The tasks that have limits."""
        return (*self.tasks, *self.perplexity)

    def label(self, task: str, limit: TaskPolicy | PerplexityPolicy) -> str:
        """The task's name; with metric and filter where it has several limits."""
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
