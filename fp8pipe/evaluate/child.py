"""Child processes of this room: `python -m MODULE REQUEST`, supervised. An error of fp8pipe's own kind that a child
meets is raised in the parent, as the class it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fp8pipe import errors
from fp8pipe.errors import Fp8PipeError
from fp8pipe.machine.supervise import Ending, Message, Send, supervise


def run_child(
    module: str,
    request: Path,
    *,
    log: Path,
    on_message: Callable[[Message], None] = lambda message: None,
    stall_s: float | None = None,
) -> Ending:
    """Run the module on the request to its end. Raises the error that it reported, if it did."""
    reported: list[Message] = []

    def receive(message: Message) -> None:
        if "error" in message:
            reported.append(message)
        else:
            on_message(message)

    command = [sys.executable, "-m", module, str(request.resolve())]
    ending = supervise(command, log=log, on_message=receive, stall_s=stall_s)
    if reported:
        raise _error_in(reported[-1], ending)
    return ending


def _error_in(message: Message, ending: Ending) -> Fp8PipeError:
    found = getattr(errors, message["error"], None)
    kind = found if isinstance(found, type) and issubclass(found, Fp8PipeError) else Fp8PipeError
    return kind(f"{message['message']} (log: {ending.log})")


@contextlib.contextmanager
def reporting_errors(send: Send) -> Iterator[None]:
    """For the child: report an Fp8PipeError to the parent before it ends the process."""
    try:
        yield
    except Fp8PipeError as error:
        send({"error": type(error).__name__, "message": str(error)})
        raise
