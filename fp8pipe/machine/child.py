"""Child processes that do a stage's work: `python -m MODULE REQUEST`, supervised. An error of fp8pipe's own kind that a
child meets is raised in the parent, as the class it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from fp8pipe import errors
from fp8pipe.errors import Fp8PipeError
from fp8pipe.machine.engine_python import engine, own
from fp8pipe.machine.locks import Held
from fp8pipe.machine.supervise import Ending, Message, Send, supervise

_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""CUDA numbers GPUs as nvidia-smi does, and so as those that are locked; by default it puts the fastest first."""


def run_child(
    module: str,
    request: Path,
    *,
    log: Path,
    in_engine: bool = False,
    on_message: Callable[[Message], Message | None] = lambda message: None,
    on_tick: Callable[[], None] = lambda: None,
    stall_s: float | None = None,
    held: Held | None = None,
    token: bool = False,
) -> Ending:
    """Run the module on the request to its end. Raises the error that it reported, if it did.

    in_engine: in the engine's environment, not in that of this process.
    on_message: returns the answer to a message that asks for one. on_tick: runs several times a second.
    held: locks that it shares, and the GPUs that it may use. token: whether it gets the Hub's token.
    """
    reported: list[Message] = []

    def receive(message: Message) -> Message | None:
        if "error" not in message:
            return on_message(message)
        reported.append(message)
        return None

    held = held or Held()
    place = engine() if in_engine else own()
    ending = supervise(
        place.command(module, request.resolve()),
        log=log,
        env=place.variables(_ORDER | held.environ),
        on_message=receive,
        on_tick=on_tick,
        stall_s=stall_s,
        locks=held.locks,
        token=token,
    )
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
