"""What a person sees in the terminal: one line per stage and a table at the end, but nothing that libraries print.

Libraries and child processes write to stdout and stderr as they like, so `quiet_terminal` redirects both to a log file
and keeps the real terminal for fp8pipe.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fp8pipe.progress import ProgressEvent, describe

PRINT_EVERY_S = 30


@contextmanager
def quiet_terminal(log_path: Path) -> Iterator[Console]:
    """Redirect file descriptors 1 and 2 to `log_path`; the yielded console writes to the terminal's stderr."""
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
    before: float = 0
    """What an earlier run had already done, by the first event with a unit."""
    failed: bool = False

    def elapsed(self) -> float:
        return time.monotonic() - self.started if self.seconds is None else self.seconds

    def line(self) -> str:
        return describe(self.event, before=self.before, seconds=self.elapsed())

    def take(self, event: ProgressEvent) -> None:
        if event.unit and not self.event.unit:
            self.before = event.done
        self.event = event


@dataclass
class StageDisplay:
    """A live list of stages: a context manager that takes ProgressEvents from any thread. A stage lasts until the next
    one begins, or until its own end if it runs beside the others.

    If the output is not a terminal, it prints a line when a stage starts, one every half minute, one when it ends, and
    one for each run that it waits for.
    """

    console: Console
    stages: list[_Stage] = field(default_factory=list)
    _live: Live | None = None
    _printed: float = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> StageDisplay:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=8)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._finish(self._running(), failed=error is not None)
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def __call__(self, event: ProgressEvent) -> None:
        with self._lock:
            stage = next((stage for stage in self._running() if stage.name == event.stage), None)
            if not event.beside:
                self._finish([other for other in self._running() if other is not stage and not other.event.beside])
            if stage is None:
                stage = _Stage(event.stage, time.monotonic(), event, before=event.done)
                self.stages.append(stage)
                self._print(f"  ... {event.stage} {event.note}")
            else:
                waits = event.waiting and event.note != stage.event.note
                stage.take(event)
                if waits or time.monotonic() - self._printed > PRINT_EVERY_S:
                    self._print(f"      {event.stage:<22} {stage.line()}")
            if event.ended:
                self._finish([stage])

    def _running(self) -> list[_Stage]:
        return [stage for stage in self.stages if stage.seconds is None]

    def _finish(self, stages: Iterable[_Stage], *, failed: bool = False) -> None:
        for stage in stages:
            stage.seconds, stage.failed = stage.elapsed(), failed
            self._print(f"  {'--' if failed else 'ok'}  {stage.name:<22} {stage.seconds:6.1f} s  {stage.line()}")

    def _print(self, line: str) -> None:
        if self._live is None:
            self._printed = time.monotonic()
            self.console.print(line.rstrip(), markup=False)

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for stage in self.stages:
            running = stage.seconds is None
            ended = Text("✗", style="red") if stage.failed else Text("✓", style="green")
            mark = Spinner("dots", style="cyan") if running else ended
            name = Text(stage.name, style="bold" if running else "")
            table.add_row(mark, name, Text(f"{stage.elapsed():6.1f} s", style="dim"), Text(stage.line(), style="dim"))
        return table
