"""The baseline of a release, measured while the checkpoint is made wherever the two need different devices."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from contextvars import copy_context
from types import TracebackType

from prefect.futures import PrefectFuture

from fp8pipe import stages
from fp8pipe.config import ResolvedRelease
from fp8pipe.records import EvalReport, Snapshot
from fp8pipe.release.workspace import Workspace
from tasks.evaluate import evaluate_baseline
from tasks.progress import Stopped

Reports = tuple[EvalReport, ...]
"""One for each look."""


class Baseline(AbstractContextManager["Baseline"]):
    """A baseline that may be measured beside the stages that make the checkpoint. Use it in a flow: inside the context,
    whichever of the two sides fails ends the other, and nothing is left running outside of it."""

    def __init__(self, job: ResolvedRelease, workspace: Workspace) -> None:
        self.stop = threading.Event()
        """Ends both sides; their listeners look at it."""
        self._job, self._workspace = job, workspace
        self._flow = copy_context()
        self._running: PrefectFuture[Reports] | None = None

    def start(self, snapshot: Snapshot) -> None:
        """Measure from now on, if the engine has a device of its own: the files of the source are on this machine."""
        if self._running is None and stages.engine_leaves_the_cpu():
            submit = evaluate_baseline.submit
            self._running = self._flow.run(submit, snapshot, self._job, self._workspace, self.stop)
            self._running.add_done_callback(self._look_at)

    def reports(self, snapshot: Snapshot) -> Reports:
        """The reports, measured now unless they are being measured already."""
        if self._running is None:
            return evaluate_baseline(snapshot, self._job, self._workspace, None)
        return self._running.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        if self._running is None:
            return
        self._running.wait()
        if isinstance(error, Stopped):
            self._running.result()  # raises what ended this side too

    def _look_at(self, running: PrefectFuture[Reports]) -> None:
        running.wait()  # it has ended: this reads its state
        if not running.state.is_completed():
            self.stop.set()
