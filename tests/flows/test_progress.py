"""What people see while a stage runs."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from rich.console import Console

import tasks.progress as task_progress
from fp8pipe.progress import Overlap, ProgressEvent, describe, human_bytes, human_seconds, quiet
from fp8pipe.ui.terminal import StageDisplay


def test_a_line_says_how_much_how_fast_and_how_much_longer() -> None:
    event = ProgressEvent("quantize", 1.5e9, 2e9, "B", "40/99 tensors")
    assert describe(event, before=0.5e9, seconds=2) == "1.5 GB of 2.0 GB  500.0 MB/s  1 s left  40/99 tensors"


def test_what_an_earlier_run_had_finished_is_not_this_ones_speed() -> None:
    event = ProgressEvent("quantize", 1.5e9, 2e9, "B")
    assert "/s" not in describe(event, before=1.5e9, seconds=2)


def test_no_rate_is_shown_before_it_means_something() -> None:
    assert describe(ProgressEvent("x", 5, 10, "layers"), before=0, seconds=0.1) == "5 of 10 layers"


def test_the_first_of_many_steps_does_not_say_how_long_the_rest_takes() -> None:
    assert (
        describe(ProgressEvent("x", 1, 2000, "requests"), before=0, seconds=30) == "1 of 2000 requests  0.0 requests/s"
    )
    assert "left" in describe(ProgressEvent("x", 20, 2000, "requests"), before=0, seconds=30)
    assert "left" in describe(ProgressEvent("x", 1, 2, "layers"), before=0, seconds=30)


def test_a_finished_stage_has_nothing_left() -> None:
    assert describe(ProgressEvent("x", 10, 10, "layers"), before=0, seconds=5) == "10 of 10 layers  2.0 layers/s"


@pytest.mark.parametrize(("seconds", "text"), [(4, "4 s"), (95, "1 min 35 s"), (4000, "1 h 6 min")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (1536, "1.5 kB"), (2.5e12, "2.5 TB")])
def test_sizes_count_in_thousands(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_a_download_beside_the_quantization_is_its_note_until_it_is_complete() -> None:
    told: list[ProgressEvent] = []
    both = Overlap(told.append, "quantize")
    both.earlier(ProgressEvent("source", 1e6, 2e6, "B", "a.safetensors"))
    both.later(ProgressEvent("quantize", 5e5, 2e6, "B", "1/9 tensors"))
    both.earlier(ProgressEvent("source", 2e6, 2e6, "B", "b.safetensors"))
    assert {event.stage for event in told} == {"quantize"}
    assert [event.note for event in told] == [
        "1.0 MB of 2.0 MB downloaded",
        "1/9 tensors  1.0 MB of 2.0 MB downloaded",
        "1/9 tensors",
    ]
    assert [event.done for event in told] == [0, 5e5, 5e5]


RUN: ContextVar[str] = ContextVar("RUN", default="none")
"""Stands for what Prefect keeps of the run that a thread is in."""


def in_threads(*calls: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_events_of_other_threads_belong_to_the_task_that_made_the_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def create(**_: Any) -> UUID:
        runs.append(RUN.get())
        return uuid4()

    def update(*_: Any, **__: Any) -> None:
        runs.append(RUN.get())

    monkeypatch.setattr(task_progress, "create_progress_artifact", create)
    monkeypatch.setattr(task_progress, "update_progress_artifact", update)
    token = RUN.set("the task")
    report = task_progress.reporter("quantize", "model")
    RUN.reset(token)
    in_threads(*(partial(report, ProgressEvent("quantize", 2, 2, "B", note)) for note in "abc"))
    assert runs == ["the task"] * 3


@pytest.fixture
def terminal() -> Iterator[list[ProgressEvent]]:
    """What the terminal that started the flow is shown."""
    events: list[ProgressEvent] = []
    task_progress.show_on(events.append)
    yield events
    task_progress.show_on(quiet)


def test_a_prefect_that_does_not_answer_costs_the_artifact_and_not_the_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, terminal: list[ProgressEvent]
) -> None:
    def create(**_: Any) -> UUID:
        raise ConnectionError("no server")

    monkeypatch.setattr(task_progress, "create_progress_artifact", create)
    report = task_progress.reporter("quantize", "model")
    prefect_logger = logging.getLogger("prefect")
    monkeypatch.setattr(prefect_logger, "propagate", True)
    for note in "abc":
        report(ProgressEvent("quantize", 2, 2, "B", note))
    assert len(terminal) == 4
    assert [record.getMessage() for record in caplog.records] == ["quantize: Prefect shows no progress: no server"]


def shown(*events: ProgressEvent, error: type[Exception] | None = None) -> str:
    file = io.StringIO()
    display = StageDisplay(Console(file=file, width=120))
    try:
        with display:
            for event in events:
                display(event)
            if error is not None:
                raise error
    except RuntimeError:
        pass
    return file.getvalue()


def test_a_stage_that_failed_is_not_shown_as_done() -> None:
    text = shown(ProgressEvent("plan", 0, None), ProgressEvent("quantize", 1, 9, "tensors"), error=RuntimeError)
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines if not line.startswith("  ...")] == [["ok", "plan"], ["--", "quantize"]]


def test_a_stage_beside_others_lasts_until_its_own_end_and_does_not_end_them() -> None:
    beside = ProgressEvent("evaluate baseline", 1, 9, "requests", beside=True)
    text = shown(
        ProgressEvent("quantize", 1, 9, "B"),
        beside,
        ProgressEvent("quantize", 2, 9, "B"),
        ProgressEvent("validate", 1, 9, "B"),
        ProgressEvent("validate", 9, 9, "B", ended=True),
        replace(beside, done=9, ended=True),
        ProgressEvent("gate", 0, None),
    )
    lines = [line.split()[:2] for line in text.splitlines()]
    begun = [line[1] for line in lines if line[0] == "..."]
    assert begun == ["quantize", "evaluate", "validate", "gate"]
    assert [line[1] for line in lines if line[0] == "ok"] == ["quantize", "validate", "evaluate", "gate"]


def test_a_listener_ends_its_stage_once_another_one_was(terminal: list[ProgressEvent]) -> None:
    stop = threading.Event()
    report = task_progress.reporter("quantize", "model", stop=stop)
    event = ProgressEvent("quantize", 0, None)
    report(event)
    report(event)  # a stage that waits repeats its last event: it is shown once
    assert len(terminal) == 2
    stop.set()
    with pytest.raises(task_progress.Stopped):
        report(event)


def test_square_brackets_in_a_note_are_shown_as_they_are() -> None:
    assert "[bold]" in shown(ProgressEvent("plan", 0, None, note="model[bold]"))
