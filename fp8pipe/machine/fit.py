"""Whether a model fits into the memory of GPUs, by vLLM's own rules for the memory that an engine takes."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True)
class Need:
    """What one engine must hold on all its GPUs together, in bytes."""

    model: str
    """Name and format, as in `acme/tiny at BF16`."""
    weights: int
    kv_cache: int
    """For one sequence of full length, without which vLLM does not start."""
    context: int
    """Tokens of that sequence."""
    fp8_cache: bool = False
    gpus: int = 1
    """Tensor-parallel times pipeline-parallel size."""
    utilization: float = UTILIZATION

    def ranks(self, total_bytes: int) -> int:
        """The smallest power of two of GPUs of this size that hold it."""
        room, count = total_bytes * self.utilization - _OVERHEAD, 1
        while count * room < self.weights + self.kv_cache:
            count *= 2
        return count


def too_large(need: Need, gpus: Sequence[Gpu]) -> str | None:
    """Why these GPUs, all of which the engine may use, cannot hold it even if they are empty; None if they can, or if
    their memory is not told."""
    usable = gpus[:1] if gpus[0].is_instance else gpus
    if len(usable) < need.gpus:
        what = "one MIG instance at a time" if gpus[0].is_instance else f"{len(usable)}"
        return f"{need.model} is to be served on {need.gpus} GPUs, and this process may use {what}"
    sizes = [gpu.total_bytes for gpu in usable[: need.gpus] if gpu.total_bytes is not None]
    if len(sizes) < need.gpus or need.ranks(smallest := min(sizes)) <= need.gpus:
        return None
    many = f"{need.gpus} {gpus[0].name} give" if need.gpus > 1 else f"one {gpus[0].name} gives"
    return (
        f"{need.model} takes {human_bytes(need.weights)} of weights and {human_bytes(need.kv_cache)} of KV cache for "
        f"{need.context:,} tokens, and {many} it {human_bytes(need.gpus * need.utilization * smallest)}; "
        + ("use the whole GPU" if gpus[0].is_instance else _more(need.ranks(smallest)))
    )


def _more(ranks: int) -> str:
    hosts = f", on {-(-ranks // _HOST)} hosts of {_HOST}" if ranks > _HOST else ""
    return f"it takes {ranks} such GPUs{hosts}: set tensor_parallel_size in the suite's `engine`, or use larger GPUs"


def too_busy(gpus: Sequence[Gpu], utilization: float = UTILIZATION) -> str | None:
    """Why vLLM would not start on these GPUs together: other processes hold too much of one; None if it would."""
    for gpu in gpus:
        if (
            gpu.total_bytes is not None
            and gpu.free_bytes is not None
            and gpu.free_bytes < utilization * gpu.total_bytes
        ):
            return (
                f"GPU {gpu.index} ({gpu.name}): other processes hold memory; {human_bytes(gpu.free_bytes)} of "
                f"{human_bytes(gpu.total_bytes)} is free, and vLLM wants {utilization:g} of it; end those processes "
                "(see nvidia-smi), choose other GPUs with CUDA_VISIBLE_DEVICES, or lower gpu_memory_utilization in the "
                "suite's `engine`"
            )
    return None
