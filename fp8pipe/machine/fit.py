"""Whether a model fits into the memory of GPUs, by vLLM's own rules for the memory that an engine takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fp8pipe.machine.gpus import Gpu
from fp8pipe.progress import human_bytes

UTILIZATION = 0.92
"""vLLM's default for `gpu_memory_utilization`: the share of a GPU's memory that an engine takes, whatever its model.
It does not start unless so much is free (`request_memory` in vllm/v1/worker/utils.py)."""
_OVERHEAD = 1 << 30
"""Bytes on every GPU that are neither weights nor cache: CUDA's context and graphs, activations of a small batch. It is
a floor; vLLM measures the real amount."""
_HOST = 8
"""GPUs of the largest common host."""
TENSOR_SIZES = (1, 2, 4, 8)
"""Tensor-parallel sizes to choose from."""


@dataclass(frozen=True, slots=True)
class Need:
    """What the engine of an evaluation must hold, in bytes."""

    model: str
    """Name and format, as in `acme/tiny at BF16`."""
    weights: int
    kv_cache: int
    """For one sequence of full length, without which vLLM does not start."""
    context: int
    """Tokens of that sequence."""
    fp8_cache: bool = False
    heads: int = 0
    """Attention heads, which the tensor-parallel size must divide; 0 if unknown."""
    gpus: int = 1
    """GPUs that hold the model once: tensor-parallel times pipeline-parallel size."""
    copies: int = 1
    """How many times it is held: data-parallel size."""
    utilization: float = UTILIZATION

    @property
    def all_gpus(self) -> int:
        """GPUs of all copies."""
        return self.gpus * self.copies

    def fits(self, total_bytes: int, gpus: int) -> bool:
        """Whether so many GPUs of this size hold it once."""
        return gpus * (total_bytes * self.utilization - _OVERHEAD) >= self.weights + self.kv_cache

    def least(self, total_bytes: int) -> int:
        """The smallest power of two of GPUs of this size that hold it once."""
        count = 1
        while not self.fits(total_bytes, count):
            count *= 2
        return count


def tensor_size(need: Need, gpus: Sequence[Gpu], serves: Callable[[int], bool] = lambda size: True) -> int:
    """The smallest tensor-parallel size with which these GPUs hold the model; the largest if none is enough, of which
    `too_large` tells what it lacks.

    serves: whether the model can be served in this size.
    """
    usable, total = _alike(gpus), _smallest(gpus)
    sizes = [size for size in TENSOR_SIZES if size <= len(usable) and need.heads % size == 0 and serves(size)] or [1]
    return next((size for size in sizes if total is None or need.fits(total, size)), sizes[-1])


def too_large(need: Need, gpus: Sequence[Gpu]) -> str | None:
    """Why these GPUs, all of which the engine may use, cannot hold it even if they are empty; None if they can, or if
    their memory is not told."""
    usable, total, instance = _alike(gpus), _smallest(gpus), gpus[0].is_instance
    has = "one MIG instance at a time" if instance else f"{len(usable)}"
    if total is None or need.fits(total, need.gpus):
        if need.all_gpus <= len(usable):
            return None
        return f"{need.model} is to be served on {need.all_gpus} GPUs, and this process may use {has}"
    many = f"{need.gpus} {gpus[0].name} give" if need.gpus > 1 else f"one {gpus[0].name} gives"
    return (
        f"{need.model} takes {human_bytes(need.weights)} of weights and {human_bytes(need.kv_cache)} of KV cache for "
        f"{need.context:,} tokens, and {many} it {human_bytes(int(need.gpus * need.utilization * total))}; "
        + ("use the whole GPU" if instance else _more(need, need.least(total), len(usable)))
    )


def _more(need: Need, gpus: int, usable: int) -> str:
    """What would hold a model that takes so many GPUs."""
    copies = f" for each of {need.copies} copies" if need.copies > 1 else ""
    hosts = f", on {-(-gpus // _HOST)} hosts of {_HOST}" if gpus > _HOST else ""
    takes = f"it takes {gpus} such GPUs{copies}{hosts}, and this process may use {usable}"
    if gpus * need.copies > usable:
        return f"{takes}; use more of them, or larger ones"
    tensor = next(size for size in reversed(TENSOR_SIZES) if size <= gpus and need.heads % size == 0)
    spread = f"tensor: {tensor}" + f", pipeline: {gpus // tensor}" * (gpus > tensor)
    return f"{takes}; set `parallel: {{{spread}}}`, or use larger ones"


def _alike(gpus: Sequence[Gpu]) -> Sequence[Gpu]:
    """Those that one engine can use: GPUs of one model, or a single MIG instance."""
    return gpus[:1] if gpus[0].is_instance else [gpu for gpu in gpus if gpu.name == gpus[0].name]


def _smallest(gpus: Sequence[Gpu]) -> int | None:
    """Memory of the smallest of them in bytes; None if it is not told."""
    sizes = [gpu.total_bytes for gpu in _alike(gpus) if gpu.total_bytes is not None]
    return min(sizes) if len(sizes) == len(_alike(gpus)) else None


def too_busy(gpus: Sequence[Gpu], count: int = 1, utilization: float = UTILIZATION) -> str | None:
    """Why vLLM would not start on any `count` of these GPUs: other processes hold too much memory of the others; None
    if it would."""
    busy = [gpu for gpu in gpus if is_busy(gpu, utilization)]
    if len(gpus) - len(busy) >= count or not busy:
        return None
    gpu = busy[0]
    return (
        f"GPU {gpu.index} ({gpu.name}): other processes hold memory; {human_bytes(gpu.free_bytes or 0)} of "
        f"{human_bytes(gpu.total_bytes or 0)} is free, and vLLM wants {utilization:g} of it; end those processes "
        "(see nvidia-smi), choose other GPUs with CUDA_VISIBLE_DEVICES, or lower gpu_memory_utilization in the "
        "suite's `engine`"
    )


def is_busy(gpu: Gpu, utilization: float = UTILIZATION) -> bool:
    """Whether other processes hold so much memory that vLLM would not start; False if it is not told."""
    total, free = gpu.total_bytes, gpu.free_bytes
    return total is not None and free is not None and free < utilization * total
