"""Weights read from the snapshot when they are asked for, each into a map of its own.

A fresh map can have large pages, which halves the time to fill it (a layer of 124 MB: 41 ms, through malloc 79, by
safetensors 166), and it goes back to the system with the tensor.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8pipe.errors import MalformedCheckpoint
from fp8pipe.model.dtypes import DTYPES
from fp8pipe.model.headers import TensorInfo
from fp8pipe.model.shards import SourceFiles


@dataclass(frozen=True, slots=True)
class OnDisk:
    """One tensor, read whenever it is indexed: what transformers' loader asks of a slice of a safetensors file."""

    files: SourceFiles
    info: TensorInfo

    def __getitem__(self, index: object) -> Tensor:
        """All of it: the loader asks for `[...]`. Raises SourceChanged, EnvironmentFault, MemoryError."""
        info = self.info
        if info.dtype not in DTYPES:
            raise MalformedCheckpoint(f"{info.name}: no model of transformers has parameters of dtype {info.dtype}")
        if not info.nbytes:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        memory = _map(info.nbytes)
        self.files.read_into(info.shard, info.begin, memoryview(memory), info.name)
        return torch.frombuffer(memory, dtype=DTYPES[info.dtype]).view(info.shape)


def _map(size: int) -> mmap.mmap:
    """Private memory of `size` bytes, in large pages where the system has them."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"cannot map {size} bytes") from error
        raise
    with contextlib.suppress(AttributeError, OSError):  # a wish: Python or the kernel may have been built without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
