"""How a long stage reports its progress: one event type, one callable, no global state; and the words for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One step of one stage."""

    stage: str
    """The stage's name: source, calibrate, quantize, validate, evaluate, publish, ..."""
    done: float
    """How much is done, in `unit`."""
    total: float | None
    """How much there is, in `unit`; None while unknown."""
    unit: str = ""
    """"B" for bytes, else a plural noun: tensors, layers, samples, files."""
    note: str = ""
    """What the stage is working on, in a few words."""
    waiting: bool = False
    """Whether it waits for another run; `note` says for which."""
    beside: bool = False
    """Whether the stage runs beside the others of its release: none of them ends when it begins, nor it with them."""
    ended: bool = False
    """Whether the stage has ended. One that does not say so has ended when the next begins."""


SETTLE_S = 1.0
"""Seconds before a rate means anything."""
SETTLE_SHARE = 0.01
"""Share of the whole that this run must have done before its rate says how long the rest takes: the first step of a
stage also pays for its start."""

Progress = Callable[[ProgressEvent], None]
"""A listener. An error that it raises ends the stage. So that it can, a stage that waits for a child process or for a
lock repeats its last event several times a second."""


def quiet(event: ProgressEvent) -> None:
    """Ignore the event."""


def describe(event: ProgressEvent, *, before: float, seconds: float) -> str:
    """How much, how fast, how much longer: `1.2 GB of 2.0 GB  0.8 GB/s  1 s left  40/99 tensors`.

    before: what was already done when this run began, `seconds` ago; it does not count towards the speed."""
    speed = _speed(event, event.done - before, seconds)
    return "  ".join(part for part in (_amount(event), *speed, event.note) if part)


def _speed(event: ProgressEvent, done: float, seconds: float) -> tuple[str, ...]:
    if seconds < SETTLE_S or done <= 0 or not event.unit:
        return ()
    rate = done / seconds
    speed = f"{human_bytes(rate)}/s" if event.unit == "B" else f"{rate:.1f} {event.unit}/s"
    foreseeable = event.total is not None and done >= SETTLE_SHARE * event.total
    left = (event.total - event.done) / rate if event.total and foreseeable else 0
    return (speed, f"{human_seconds(left)} left") if left > 0 else (speed,)


@dataclass
class Overlap:
    """Two stages that run at once, shown as the later one: its events, with the earlier one's amount in their note.

    Until the later one reports, the earlier one's events are shown as the later one with nothing done yet."""

    listener: Progress
    stage: str
    _arrived: str = ""
    _last: ProgressEvent | None = None

    def earlier(self, event: ProgressEvent) -> None:
        """An event of what comes first, such as a download."""
        complete = event.total is not None and event.done >= event.total
        self._arrived = "" if complete else f"{_amount(event)} downloaded"
        last = self._last or ProgressEvent(self.stage, 0, None)
        self.listener(replace(last, note="  ".join(part for part in (last.note, self._arrived) if part)))

    def later(self, event: ProgressEvent) -> None:
        """An event of the later stage."""
        self._last = event
        self.listener(replace(event, note="  ".join(part for part in (event.note, self._arrived) if part)))


def _amount(event: ProgressEvent) -> str:
    if event.unit == "B":
        return human_bytes(event.done) + (f" of {human_bytes(event.total)}" if event.total else "")
    if event.unit:
        return f"{event.done:.0f}" + (f" of {event.total:.0f}" if event.total else "") + f" {event.unit}"
    return ""


def human_bytes(count: float) -> str:
    """1536 -> `1.5 kB`; powers of 1000, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """95 -> `1 min 35 s`; 4000 -> `1 h 6 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
