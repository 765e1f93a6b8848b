"""Tensors on disk put into a model as transformers' own loader puts them there, a few at a time.

In: a model on the meta device, and some of its tensors by their names on disk. Out: the parameters that they fill, as
`from_pretrained` would have filled them. So no model is ever whole in memory.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from fp8pipe.errors import MalformedCheckpoint
from fp8pipe.model.dtypes import DTYPES
from fp8pipe.model.headers import TensorInfo
from fp8pipe.model.shards import SourceFiles


def load_into(model: PreTrainedModel, tensors: dict[str, Any], device: torch.device, dtype: torch.dtype) -> list[str]:
    """Convert `tensors` (name on disk -> Tensor or OnDisk) and put them into `model`. What went wrong, in words: the
    loader catches every error and keeps only its text. Raises MemoryError if it is the allocator's."""
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]  # its own result
    )
    with _no_bars():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
    problems = sorted([*map(str, info.mismatched_keys), *map(str, info.conversion_errors.items()), *info.error_msgs])
    if short := [text for text in problems if is_out_of_memory(RuntimeError(text))]:
        raise MemoryError(short[0])
    return problems


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has an error for GPUs, but its CPU allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "status_alloc_failed")  # the last is cuBLAS's and cuDNN's
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its full name."""
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Put another tensor in the place of a parameter or buffer."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars, of which there would be one per layer."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------- one tensor


@dataclass(frozen=True, slots=True)
class OnDisk:
    """One tensor of the snapshot, read whenever it is indexed: all that transformers' loader asks of a slice."""

    files: SourceFiles
    info: TensorInfo
    arrived: Callable[[str, Tensor], Tensor] | None = None
    """Given the name and the values, on the CPU, as soon as they are read; returns what the loader gets."""

    def __getitem__(self, index: object) -> Tensor:
        """The whole tensor: the loader asks for `[...]`. Raises SourceChanged, EnvironmentFault, MemoryError."""
        info = self.info
        if info.dtype not in DTYPES:
            raise MalformedCheckpoint(f"{info.name}: no model of transformers has parameters of dtype {info.dtype}")
        if not info.nbytes:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        memory = _map(info.nbytes)
        self.files.read_into(info.shard, info.begin, memoryview(memory), info.name)
        tensor = torch.frombuffer(memory, dtype=DTYPES[info.dtype]).view(info.shape)
        return tensor if self.arrived is None else self.arrived(info.name, tensor)


def _map(size: int) -> mmap.mmap:
    """Private memory of `size` bytes that goes back to the system with the tensor, in large pages where possible.

    Large pages halve the time to fill it: a layer of 124 MB takes 41 ms, through malloc 79, by safetensors 166.
    """
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"cannot map {size} bytes") from error
        raise
    with suppress(AttributeError, OSError):  # Python or the kernel may have been built without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
