"""How much a config from strangers may make a library build: objects, memory and time, by what lies on disk.

A config of one line can ask for a billion layers. Every parameter of a model is stored somewhere, so a model with many
times the tensors on disk is none, and its building stops there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fp8pipe.machine import memory

if TYPE_CHECKING:
    from torch import nn

UNKNOWN_TENSORS = 10_000
"""Taken for the number of tensors where only a config is known."""
ADVICE = "correct the sizes in config.json, num_hidden_layers first"

_PARTS, _PARTS_EACH = 20_000, 20
"""Modules and parameters of any model, and for each tensor on disk. DeepSeek-V3 has 2 100 of them in transformers and
3 400 in vLLM."""
_BYTES, _BYTES_EACH = 8_000_000_000, 8_000
"""Of private memory of a child. DeepSeek-V3's 91 991 tensors take 0.8 GB in transformers and 1.5 GB in vLLM."""
_BUILD_BYTES, _BUILD_BYTES_EACH = 1_000_000_000, 20_000
"""Of private memory for building a model on the meta device, its config included."""
_SECONDS, _SECONDS_EACH = 240.0, 0.004
"""DeepSeek-V3 takes 90 s in transformers on two cores that ten processes share, imports included."""


class TooLarge(RuntimeError):
    """The model is larger than its files can hold; the message says so."""


@contextmanager
def building(tensors: int = UNKNOWN_TENSORS) -> Iterator[None]:
    """Inside the context, building a torch model of too many parts, or in too much memory, for `tensors` on disk raises
    TooLarge."""
    from torch.nn.modules import module

    most, count = _PARTS + _PARTS_EACH * tensors, 0

    def register(owner: nn.Module, name: str, part: Any) -> None:  # Any: a module or a parameter
        nonlocal count
        count += 1
        if count > most:
            raise TooLarge(
                f"config.json asks for a model of more than {most} modules and parameters, and {tensors} tensors are "
                f"on disk; {ADVICE}"
            )

    hooks = (
        module.register_module_parameter_registration_hook(register),
        module.register_module_module_registration_hook(register),
    )
    room = _BUILD_BYTES + _BUILD_BYTES_EACH * tensors
    try:
        with memory.at_most(room):
            yield
    except MemoryError as error:
        raise TooLarge(
            f"config.json asks for a model that takes more than {room / 1e9:.1f} GB to build without weights, and "
            f"{tensors} tensors are on disk; {ADVICE}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def memory_bytes(tensors: int) -> int:
    """Private memory that a child may have for a model of `tensors` on disk."""
    return _BYTES + _BYTES_EACH * tensors


def timeout_s(tensors: int) -> float:
    """Seconds that a child may take for a model of `tensors` on disk."""
    return _SECONDS + _SECONDS_EACH * tensors
