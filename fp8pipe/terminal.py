"""What the person at the terminal sees: one line per stage, a table at the end, and nothing that a library prints.

Libraries and child processes write where they like; `quiet_terminal` points the process's own stdout and stderr at a
log file and gives the real terminal to fp8pipe alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fp8pipe.progress import ProgressEvent


@contextmanager
def quiet_terminal(log_path: Path) -> Iterator[Console]:
    """File descriptors 1 and 2 write to `log_path` inside; the yielded console writes to the terminal's stderr."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    terminal = os.fdopen(saved[1], "w", closefd=False)
    try:
        yield Console(file=terminal, highlight=False, soft_wrap=not terminal.isatty())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        terminal.flush()
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


@dataclass
class _Stage:
    name: str
    started: float
    event: ProgressEvent
    seconds: float | None = None


@dataclass
class StageDisplay:
    """A live list of stages. Use as a context manager; call it with ProgressEvents from any thread.

    On something that is not a terminal it prints one line when a stage starts and one when it is done.
    """

    console: Console
    stages: list[_Stage] = field(default_factory=list)
    _live: Live | None = None

    def __enter__(self) -> StageDisplay:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=8)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish_last()
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def __call__(self, event: ProgressEvent) -> None:
        if not self.stages or self.stages[-1].name != event.stage:
            self._finish_last()
            self.stages.append(_Stage(event.stage, time.monotonic(), event))
            if self._live is None:
                self.console.print(f"  ... {event.stage} {event.note}".rstrip())
        else:
            self.stages[-1].event = event

    def _finish_last(self) -> None:
        if self.stages and self.stages[-1].seconds is None:
            stage = self.stages[-1]
            stage.seconds = time.monotonic() - stage.started
            if self._live is None:
                self.console.print(f"  ok  {stage.name:<22} {stage.seconds:6.1f} s  {_amount(stage.event)}".rstrip())

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for stage in self.stages:
            running = stage.seconds is None
            seconds = time.monotonic() - stage.started if stage.seconds is None else stage.seconds
            mark = Spinner("dots", style="cyan") if running else Text("✓", style="green")
            name = Text(stage.name, style="bold" if running else "")
            table.add_row(mark, name, Text(f"{seconds:6.1f} s", style="dim"), Text(_amount(stage.event), style="dim"))
        return table


def _amount(event: ProgressEvent) -> str:
    parts = []
    if event.unit == "B":
        parts.append(human_bytes(event.done) + (f" of {human_bytes(event.total)}" if event.total else ""))
    elif event.unit:
        total = f" of {event.total:.0f}" if event.total else ""
        parts.append(f"{event.done:.0f}{total} {event.unit}")
    if event.note:
        parts.append(event.note)
    return "  ".join(parts)


def human_bytes(count: float) -> str:
    """1536 -> `1.5 kB`; powers of 1000, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
