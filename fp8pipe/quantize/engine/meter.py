"""Progress of a run in source bytes."""

from __future__ import annotations

import math
import threading

from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.progress import Progress, ProgressEvent
from fp8pipe.quantize.plan import OutputTensor, Plan

WORK = frozenset(("copy", "dequantize", "weight"))
"""Roles of outputs that the engine writes; the others are scales."""


class Meter:
    """Progress in source bytes, told about every 32 MB and at the end of each tensor's last one."""

    def __init__(self, plan: Plan, finished: set[str], progress: Progress) -> None:
        work = [output for output in plan.outputs if output.role in WORK]
        sources = {tensor.name: tensor.info for tensor in plan.tensors}
        share = {output.name: _source_share(output, sources[output.source]) for output in work}
        self._total = sum(share.values())
        self._done = sum(share[name] for name in finished if name in share)
        self._tensors, self._all_tensors = len(finished & set(share)), len(work)
        self._told = self._done
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._done - self._told >= 32 << 20:
                self._tell()

    def finish_tensor(self) -> None:
        with self._lock:
            self._tensors += 1
            if self._tensors == self._all_tensors:
                self._tell()

    def _tell(self) -> None:
        self._told = self._done
        note = f"{self._tensors}/{self._all_tensors} tensors"
        self._progress(ProgressEvent("quantize", self._done, self._total, "B", note))


def _source_share(output: OutputTensor, info: TensorInfo) -> int:
    """Source bytes behind an output: all for a copy or a whole weight, its part of a tensor of experts."""
    return info.nbytes if output.slice is None else math.prod(output.shape) * ITEM_BYTES[info.dtype]
