"""How the engine of an evaluation is spread over devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from fp8pipe.config.base import Config

_ARGUMENTS = {
    "tensor": "tensor_parallel_size",
    "pipeline": "pipeline_parallel_size",
    "data": "data_parallel_size",
    "expert": "enable_expert_parallel",
}
"""Field -> vLLM's engine argument."""


class Parallel(Config):
    """How many devices serve the model, and which part of it each holds; the same for baseline and candidate."""

    tensor: int = Field(default=1, ge=1)
    """Devices that hold a part of every layer each."""
    pipeline: int = Field(default=1, ge=1)
    """Groups of such devices that hold some of the layers each."""
    data: int = Field(default=1, ge=1)
    """Copies of the model, each on devices of its own, that share the prompts."""
    expert: bool = False
    """Each of the `tensor` devices holds some of the experts, instead of a part of each."""

    @model_validator(mode="before")
    @classmethod
    def _in_words(cls, value: Any) -> Any:  # Any: whatever was written
        """`tensor=4,expert`, as a command line has it."""
        if not isinstance(value, str):
            return value
        pairs = (part.strip().partition("=") for part in value.split(","))
        return {name: size if equals else True for name, equals, size in pairs}

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Parallel:
        """That of these engine arguments, vLLM's or those of lm-eval's command line."""
        given = {field: arguments.get(argument) for field, argument in _ARGUMENTS.items()}
        return cls.model_validate({field: value for field, value in given.items() if value is not None})

    @property
    def copy_devices(self) -> int:
        """Devices that hold the model once."""
        return self.tensor * self.pipeline

    @property
    def devices(self) -> int:
        """Devices of all copies."""
        return self.copy_devices * self.data

    @property
    def arguments(self) -> dict[str, Any]:
        """vLLM's engine arguments, where they are not its defaults."""
        return {_ARGUMENTS[field]: value for field, value in self.model_dump(exclude_defaults=True).items()}

    @property
    def spelled(self) -> str:
        """As a command line has it: `tensor=4,expert`; empty on one device."""
        sizes = self.model_dump(exclude_defaults=True)
        return ",".join(f"{name}={value}".removesuffix("=True") for name, value in sizes.items())

    def __str__(self) -> str:
        """`tensor 4, data 2`; `none` on one device."""
        sizes = self.model_dump(exclude_defaults=True)
        return ", ".join(f"{name} {value}".removesuffix(" True") for name, value in sizes.items()) or "none"


Parallelism = Parallel | Literal["auto"]
"""auto: the smallest number of devices that hold the model."""


def refuse_raw(engine: Mapping[str, Any]) -> None:
    """Raise ValueError if these engine arguments say how the engine is spread."""
    for field, argument in _ARGUMENTS.items():
        if argument in engine:
            value = str(engine[argument]).lower()
            raise ValueError(f"{argument}: write `parallel: {{{field}: {value}}}` beside `engine` instead")
