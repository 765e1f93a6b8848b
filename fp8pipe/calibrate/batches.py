"""Samples of equal length share a forward pass, so that weights are read once for many tokens and nothing is padded.

Also: what running out of memory looks like, on the GPU and on the CPU, and how the CPU's is given back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

TOKENS = {"cpu": 1024, "cuda": 16384}
"""Largest pass by kind of device, in tokens; a longer sample is a pass of its own. On a CPU twice as many are a few
percent faster, and take 100 MB more (ffn of 8192)."""

_MMAP_THRESHOLD, _LARGE = -3, 1 << 20
"""M_MMAP_THRESHOLD of mallopt(3), and the size in bytes from which a block is mapped by itself."""


def micro_batches(token_ids: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[int, ...]]:
    """Indices of the samples of each pass: equal lengths, at most `max_tokens` together, or one sample."""
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(token_ids):
        by_length.setdefault(len(ids), []).append(index)
    batches = []
    for length, indices in by_length.items():
        size = max(1, max_tokens // length)
        batches += [tuple(indices[start : start + size]) for start in range(0, len(indices), size)]
    return sorted(batches)


def smaller(batches: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]]) -> int | None:
    """Half the tokens of the largest pass that can be cut, None when every pass is one sample."""
    tokens = [len(batch) * len(token_ids[batch[0]]) for batch in batches if len(batch) > 1]
    return max(tokens) // 2 if tokens else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's own error on a GPU; its CPU allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "status_alloc_failed")  # the last is cuBLAS's and cuDNN's
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def give_back_freed() -> None:
    """Large tensors go back to the system as soon as they are freed.

    glibc keeps blocks of up to 32 MiB once it has seen such blocks freed, and every layer then finds the holes of the
    last one too small: a quarter of the memory of a calibration was such holes.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # not with musl
        libc.mallopt(_MMAP_THRESHOLD, _LARGE)
