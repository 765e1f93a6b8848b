"""Progress of a running task, for the terminal that started the flow (if any) and for a Prefect progress artifact."""

from __future__ import annotations

import re
import threading
import time
from contextvars import copy_context
from dataclasses import replace
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.context import TaskRunContext
from prefect.logging import get_logger
from prefect.states import Running

from fp8pipe.progress import Progress, ProgressEvent, describe, quiet
from fp8pipe.release.card.markdown import escape

AWAITING = "AwaitingDevice"
"""Name of the state of a flow run that waits until another run is done with a device, or with a folder of both."""
_UPDATE_EVERY_S = 2.0

_terminal: Progress = quiet


def show_on(listener: Progress) -> None:
    """Also send the progress of all tasks of this process to `listener`."""
    global _terminal
    _terminal = listener


class Stopped(Exception):
    """The stage was ended because something else in its release was."""


def reporter(stage: str, note: str, *, stop: threading.Event | None = None, beside: bool = False) -> Reporter:
    """A listener for one task, which announces `stage` at once. note: what it works on. Call it in the task.

    stop: once it is set, the listener raises Stopped, which ends the stage. beside: the stage runs beside others."""
    return Reporter(stage, note, stop, beside)


def artifact_key(*parts: str) -> str:
    """`parts` as one artifact key: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def keep_page(text: str, *, key: str, description: str) -> None:
    """A Markdown artifact of the running task. The description is words, whatever is in the names that it has."""
    create_markdown_artifact(text, key=key, description=escape(description))


class Reporter:
    """Renames a stage's events to the task's stage and keeps one progress artifact, updated every few seconds. While
    the stage waits for another run, the state of the flow run says so.

    Events come from any thread, and the threads of a pool lack the context that links an artifact to its task. When
    Prefect does not answer, artifact and state are lost but the work continues.
    """

    def __init__(self, stage: str, note: str, stop: threading.Event | None, beside: bool) -> None:
        self.stage = stage
        self.note = note
        self.stop = stop
        self.beside = beside
        self.last = ProgressEvent(stage, 0, None, note=note, beside=beside)
        self.artifact: UUID | None = None
        self.updated = 0.0
        self.started = time.monotonic()
        self.before: float | None = None
        self.task = copy_context()
        self.lock = threading.Lock()
        self.failed = False
        self.waits_for = ""
        self._go_on_or_end()
        _terminal(self.last)

    def __call__(self, event: ProgressEvent) -> None:
        self._go_on_or_end()
        event = replace(event, stage=self.stage, beside=self.beside)
        if event == self.last:  # a stage that waits repeats it
            return
        self.last = event
        _terminal(event)
        with self.lock:
            try:
                self.task.copy().run(self._show, event)  # a copy: a context serves one thread at a time
                self.failed = False
            except Exception as error:  # progress must never end the work
                if not self.failed:
                    get_logger(__name__).warning("%s: Prefect shows no progress: %s", self.stage, error)
                self.failed = True

    def _go_on_or_end(self) -> None:
        if self.stop is not None and self.stop.is_set():
            raise Stopped(f"{self.stage}: ended, because another stage of this release was")

    def end(self) -> None:
        """Say that the stage has ended, where another one may not begin at once."""
        _terminal(replace(self.last, ended=True))

    def _show(self, event: ProgressEvent) -> None:
        waits_for = event.note if event.waiting else ""
        if waits_for != self.waits_for:
            self.waits_for = waits_for
            _set_state(waits_for)
        if event.total:
            self._keep_artifact(event)

    def _keep_artifact(self, event: ProgressEvent) -> None:
        assert event.total
        if self.before is None and event.unit:
            self.before = event.done
        percent = min(100.0, 100.0 * event.done / event.total)
        if percent < 100 and time.monotonic() - self.updated < _UPDATE_EVERY_S:
            return
        self.updated = time.monotonic()
        line = describe(event, before=self.before or 0, seconds=time.monotonic() - self.started)
        text = escape(f"{self.stage}: {self.note}, {line}")
        if self.artifact is None:
            self.artifact = _create(artifact_key("progress", self.stage, self.note), percent, text)
        else:
            update_progress_artifact(self.artifact, progress=percent, description=text)


def _set_state(waits_for: str) -> None:
    """Set the state of the flow run that this task belongs to: AwaitingDevice with a message, then Running again.

    A run that was cancelled meanwhile stays that."""
    context = TaskRunContext.get()
    if context is None or context.task_run.flow_run_id is None:
        return
    run_id = context.task_run.flow_run_id
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
        if state is not None and state.is_running():
            waiting = Running(name=AWAITING, message=waits_for)
            client.set_flow_run_state(run_id, waiting if waits_for else Running())


def _create(key: str, percent: float, text: str) -> UUID:
    made = create_progress_artifact(progress=percent, key=key, description=text)
    assert isinstance(made, UUID)  # called from synchronous code, it returns the id
    return made
