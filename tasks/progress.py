"""Progress of a running task, to the terminal that started the flow (if one did) and to a Prefect progress artifact."""

from __future__ import annotations

import re
import threading
import time
from contextvars import copy_context
from dataclasses import replace
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_logger

from fp8pipe.progress import Progress, ProgressEvent, describe, quiet

_UPDATE_EVERY_S = 2.0

_terminal: Progress = quiet


def show_on(listener: Progress) -> None:
    """Send the progress of all tasks of this process to `listener` as well."""
    global _terminal
    _terminal = listener


def reporter(stage: str, subject: str) -> Progress:
    """A listener for one task, which announces `stage` at once; `subject` is what is worked on. Call it in the task."""
    listener = _Reporter(stage, subject)
    _terminal(ProgressEvent(stage, 0, None, note=subject))
    return listener


def artifact_key(*parts: str) -> str:
    """Prefect's artifact keys: lower case, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


class _Reporter:
    """Renames the room's events to the task's stage, and keeps one progress artifact, updated every few seconds.

    Events come from any thread; those of a pool know nothing of the task that Prefect would link the artifact to. A
    Prefect that does not answer costs the artifact, not the work."""

    def __init__(self, stage: str, subject: str) -> None:
        self.stage = stage
        self.subject = subject
        self.artifact: UUID | None = None
        self.updated = 0.0
        self.started = time.monotonic()
        self.before: float | None = None
        self.task = copy_context()
        self.lock = threading.Lock()
        self.failed = False

    def __call__(self, event: ProgressEvent) -> None:
        _terminal(replace(event, stage=self.stage))
        if not event.total:
            return
        with self.lock:
            try:
                self.task.copy().run(self._keep_artifact, event)  # a copy: two threads cannot be in one context
                self.failed = False
            except Exception as error:  # whatever a server, a network or a client can do wrong: it is progress only
                if not self.failed:
                    get_logger(__name__).warning("%s: progress is not shown: %s", self.stage, error)
                self.failed = True

    def _keep_artifact(self, event: ProgressEvent) -> None:
        assert event.total
        if self.before is None and event.unit:
            self.before = event.done
        percent = min(100.0, 100.0 * event.done / event.total)
        if percent < 100 and time.monotonic() - self.updated < _UPDATE_EVERY_S:
            return
        self.updated = time.monotonic()
        line = describe(event, before=self.before or 0, seconds=time.monotonic() - self.started)
        text = f"{self.stage}: {self.subject}, {line}"
        if self.artifact is None:
            self.artifact = _create(artifact_key("progress", self.stage, self.subject), percent, text)
        else:
            update_progress_artifact(self.artifact, progress=percent, description=text)


def _create(key: str, percent: float, text: str) -> UUID:
    made = create_progress_artifact(progress=percent, key=key, description=text)
    assert isinstance(made, UUID)  # the synchronous call returns the id, not a coroutine
    return made
