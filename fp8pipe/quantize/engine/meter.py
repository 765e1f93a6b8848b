"""Progress of a run in source bytes."""

from __future__ import annotations

import math
import threading

from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.progress import Progress, ProgressEvent
from fp8pipe.quantize.plan import OutputTensor, Plan

WORK = frozenset(("copy", "dequantize", "weight"))
"""Roles of outputs that count as work; the others are scales."""


class Meter:
    """Reports progress in source bytes, about every 32 MB and when the last tensor is finished."""

    def __init__(self, plan: Plan, finished: set[str], progress: Progress) -> None:
        work = [output for output in plan.outputs if output.role in WORK]
        sources = {tensor.name: tensor.info for tensor in plan.tensors}
        share = {output.name: _source_share(output, sources[output.source]) for output in work}
        self._total = sum(share.values())
        self._done = sum(share[name] for name in finished if name in share)
        self._tensors, self._all_tensors = len(finished & set(share)), len(work)
        self._reported = self._done
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count source bytes that are done."""
        with self._lock:
            self._done += count
            if self._done - self._reported >= 32 << 20:
                self._report()

    def finish_tensor(self) -> None:
        """Count a tensor that is done."""
        with self._lock:
            self._tensors += 1
            if self._tensors == self._all_tensors:
                self._report()

    def _report(self) -> None:
        self._reported = self._done
        note = f"{self._tensors}/{self._all_tensors} tensors"
        self._progress(ProgressEvent("quantize", self._done, self._total, "B", note))


def _source_share(output: OutputTensor, info: TensorInfo) -> int:
    """Source bytes behind an output: all of its source, or its part of a tensor of experts."""
    return info.nbytes if output.slice is None else math.prod(output.shape) * ITEM_BYTES[info.dtype]
