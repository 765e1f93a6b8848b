"""Which samples share a forward pass, what the device holds, and smaller passes when memory runs out.

Samples of equal length share a pass, so that weights are read once for many tokens and nothing is padded. Out of memory
looks different on a GPU, on a CPU and in each library; `oracle.loading.is_out_of_memory` knows them all.
"""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fp8pipe.calibrate.moves import Moves
from fp8pipe.errors import EnvironmentFault
from fp8pipe.oracle.loading import is_out_of_memory

TOKENS = {"cpu": 1024, "cuda": 16384}
"""Largest pass by kind of device, in tokens; a longer sample is a pass of its own. On a CPU, passes of twice the size
are a few percent faster and take 100 MB more (for an ffn of 8192)."""

_MMAP_THRESHOLD, _LARGE = -3, 1 << 20
"""M_MMAP_THRESHOLD of mallopt(3), and the size in bytes from which a block gets a mapping of its own."""

_log = logging.getLogger(__name__)

Batches = Sequence[tuple[int, ...]]
"""The indices of each pass's samples."""
Result = TypeVar("Result")


def batches_of(token_ids: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[int, ...]]:
    """Samples of each pass: samples of one length with at most `max_tokens` tokens together, or one longer sample."""
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(token_ids):
        by_length.setdefault(len(ids), []).append(index)
    batches = []
    for length, indices in by_length.items():
        size = max(1, max_tokens // length)
        batches += [tuple(indices[start : start + size]) for start in range(0, len(indices), size)]
    return sorted(batches)


def with_smaller_batches(
    attempt: Callable[[Batches], Result], token_ids: Sequence[Sequence[int]], device: torch.device
) -> Result:
    """What `attempt` returns. When it runs out of memory, it is called again with at most half the tokens in a pass.

    Raises EnvironmentFault when it runs out of memory although every pass is one sample.
    """
    max_tokens = TOKENS[device.type]
    while True:
        batches = batches_of(token_ids, max_tokens)
        try:
            return attempt(batches)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            max_tokens = _fewer_tokens(batches, token_ids, error)
        _release(device)  # not in the except clause, where the error's traceback holds what the attempt had


def _fewer_tokens(batches: Batches, token_ids: Sequence[Sequence[int]], error: BaseException) -> int:
    """Half the tokens of the largest pass that holds several samples."""
    tokens = [len(batch) * len(token_ids[batch[0]]) for batch in batches if len(batch) > 1]
    if not tokens:
        longest, reason = max(map(len, token_ids)), str(error).partition("\n")[0] or type(error).__name__
        raise EnvironmentFault(
            f"out of memory although each pass was a single sample, of up to {longest} tokens ({reason}); "
            "lower calibration.max_seq_len or num_samples, or use a machine with more memory"
        ) from error
    fewer = max(tokens) // 2
    _log.warning(
        "calibration ran out of memory with up to %d samples in a pass; trying again with at most %d tokens in a pass",
        max(map(len, batches)),
        fewer,
    )
    return fewer


def _release(device: torch.device) -> None:
    """Free what a failed attempt left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Placement:
    """What is in the memory of the device that computes."""

    load_ahead: bool
    """The next layer, while one is computed."""
    hidden_on_host: bool
    """Hidden states wait in the host's memory for their pass."""


def placement(moves: Moves, *, layer: int, hidden: int) -> Placement:
    """Where a calibration keeps things. layer: bytes of the largest one; hidden: of all hidden states.

    On a CPU there is only one memory, and a second layer in it would break the promise of docs/calibration.md."""
    if moves.device.type == "cpu":
        return Placement(load_ahead=False, hidden_on_host=False)
    return placement_in(moves.free_bytes(), layer=layer, hidden=hidden)


def placement_in(free: int, *, layer: int, hidden: int) -> Placement:
    """The same for a GPU with `free` bytes. Passes need room to compute: half of the memory is left for them."""
    loading = 2 * layer  # experts that are joined, and FP8 weights, exist twice for a while
    load_ahead = layer + loading <= free // 2
    taken = loading + (layer if load_ahead else 0)
    return Placement(load_ahead, hidden_on_host=hidden > (free - taken) // 2)


def return_freed_memory() -> None:
    """From now on large tensors go back to the system as soon as they are freed.

    glibc keeps blocks of up to 32 MiB once it has seen some freed. The holes that one layer leaves are too small for
    the next, and made up a quarter of a calibration's memory."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(_MMAP_THRESHOLD, _LARGE)
