"""Progress of a running task, to the terminal that started the flow (if one did) and to a Prefect progress artifact."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from fp8pipe.progress import Progress, ProgressEvent, quiet

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
    """Renames the room's events to the task's stage, and keeps one progress artifact, updated every few seconds."""

    def __init__(self, stage: str, subject: str) -> None:
        self.stage = stage
        self.subject = subject
        self.artifact: UUID | None = None
        self.updated = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        _terminal(replace(event, stage=self.stage))
        if not event.total:
            return
        percent = min(100.0, 100.0 * event.done / event.total)
        if percent < 100 and time.monotonic() - self.updated < _UPDATE_EVERY_S:
            return
        self.updated = time.monotonic()
        if self.artifact is None:
            self.artifact = _create(self.stage, self.subject, percent)
        else:
            update_progress_artifact(self.artifact, progress=percent)


def _create(stage: str, subject: str, percent: float) -> UUID:
    made = create_progress_artifact(
        progress=percent, key=artifact_key("progress", stage, subject), description=f"{stage}: {subject}"
    )
    assert isinstance(made, UUID)  # the synchronous call returns the id, not a coroutine
    return made
