"""Renames each shard when its last tensor is written, after an fsync that runs beside the work on other shards."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from fp8pipe.model.shards import OutputShard
from fp8pipe.quantize.engine.journal import Journal
from fp8pipe.quantize.engine.meter import WORK
from fp8pipe.quantize.plan import OutputTensor, Plan


class Finisher:
    """Counts the tensors that each shard still lacks."""

    def __init__(self, plan: Plan, shards: Mapping[str, OutputShard], journal: Journal, stack: ExitStack) -> None:
        self._shards = shards
        self._journal = journal
        self._lock = threading.Lock()
        self._left = Counter(
            output.shard for output in plan.outputs if output.role in WORK and output.name not in journal.finished
        )
        self._executor = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="fsync"))
        self._futures: list[Future[None]] = []

    def start(self) -> None:
        """Finish the shards that an earlier run wrote completely but did not rename."""
        for name in self._shards:
            if not self._left[name]:
                self._futures.append(self._executor.submit(self._finish, name))

    def count_down(self, output: OutputTensor) -> None:
        """Note that `output` is written."""
        with self._lock:
            self._left[output.shard] -= 1
            if self._left[output.shard] == 0:
                self._futures.append(self._executor.submit(self._finish, output.shard))

    def _finish(self, name: str) -> None:
        self._journal.sync()
        self._shards[name].finish()

    def wait(self) -> None:
        """Return when every shard has its name, or raise the first error."""
        for future in self._futures:
            future.result()
