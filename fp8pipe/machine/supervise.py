"""Runs one command so that nothing of it outlives its parent, and says how it ended.

In: a command. Out: an Ending; everything the command prints goes to a log file, and the JSON lines it tells arrive at
a callback. Between parent and command stands a guard, this very file run as a script, which leads a session (and
process group) of its own:

    parent --- lifeline pipe ---> guard ---> command ---> whatever the command starts

The parent ends the group on timeout, stall or any exception. If the parent itself dies, however suddenly, the lifeline
closes and the guard ends the group; if the guard is killed, PR_SET_PDEATHSIG kills the command. Only the standard
library is imported here, so that the guard is up in a few milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CHANNEL = "SUPERVISE_CHANNEL"
"""Environment variable that tells the command the descriptor for its messages."""

_PR_SET_PDEATHSIG = 1
_TICK_S = 0.25
_PATIENCE = 4
"""How many times longer a command may log without telling of progress than be silent altogether: an engine of which one
process hangs goes on to log that it waits for it."""
_LINGER_S = 2.0
"""Time for what tidies up once the others are gone; it takes milliseconds."""

Message = dict[str, Any]  # Any: whatever JSON holds


@dataclass(frozen=True, slots=True)
class Ending:
    """How a supervised command ended."""

    reason: Literal["exited", "timeout", "stalled"]
    returncode: int
    """Exit status; 128 + N when signal N ended it; -1 when it was ended here."""
    seconds: float
    log: Path

    @property
    def succeeded(self) -> bool:
        """It ended by itself with status 0."""
        return self.reason == "exited" and self.returncode == 0

    def tail(self, lines: int = 25) -> str:
        """The last lines of the log, each cut to a readable length."""
        text = self.log.read_bytes()[-100_000:].decode(errors="replace").replace("\r", "\n")
        kept = [line.rstrip()[:400] for line in text.splitlines() if line.strip()]
        return "\n".join(kept[-lines:])


def supervise(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    on_message: Callable[[Message], None] = lambda message: None,
    timeout_s: float | None = None,
    stall_s: float | None = None,
    grace_s: float = 10.0,
) -> Ending:
    """Run `command` to its end, or end it: after `timeout_s`, or when it told and logged nothing for `stall_s`, or told
    nothing for four times that long.

    However this function is left, by an exception too (KeyboardInterrupt, a cancelled task), no process of the group
    stays behind, stopped or not, and no shared memory of theirs: TERM first, KILL after `grace_s`. `on_message` runs in
    the calling thread.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        lifeline, _held_open = _pipe(stack)
        messages, messages_end = _pipe(stack)
        channel = str(messages_end.fileno())
        started = time.monotonic()
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(lifeline.fileno()), channel, str(grace_s), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**(os.environ if env is None else env), CHANNEL: channel},
            pass_fds=(lifeline.fileno(), messages_end.fileno()),
            start_new_session=True,
        )
        stack.callback(_end_group, guard, grace_s)
        messages_end.close()
        reader = _Reader(messages, log, on_message)
        while True:
            exited = _has_exited(guard)
            reader.read(0.0 if exited else _TICK_S)
            now = time.monotonic()
            if exited:
                reader.drain()
                _end_group(guard, grace_s)
                return Ending("exited", guard.returncode, now - started, log)
            if timeout_s is not None and now - started > timeout_s:
                return Ending("timeout", -1, now - started, log)
            if stall_s is not None and (
                now - reader.last_sign > stall_s or now - reader.last_told > _PATIENCE * stall_s
            ):
                return Ending("stalled", -1, now - started, log)


class _Reader:
    """The parent's end of the message pipe, and the clock of the last sign of life."""

    def __init__(self, messages: io.FileIO, log: Path, on_message: Callable[[Message], None]) -> None:
        self.last_sign = self.last_told = time.monotonic()
        self._messages, self._log, self._on_message = messages, log, on_message
        self._buffer, self._log_size, self._open = b"", 0, True
        self._selector = selectors.DefaultSelector()
        self._selector.register(messages, selectors.EVENT_READ)

    def read(self, wait_s: float) -> bool:
        """Wait for one chunk, deliver the lines that are complete; True when something came."""
        if size := self._log.stat().st_size - self._log_size:
            self._log_size += size
            self.last_sign = time.monotonic()
        if not self._open:
            time.sleep(wait_s)
            return False
        if not self._selector.select(wait_s):
            return False
        chunk = os.read(self._messages.fileno(), 65536)
        self._open = bool(chunk)
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for line in lines:
            self.last_sign = self.last_told = time.monotonic()
            self._on_message(json.loads(line))
        return bool(chunk)

    def drain(self) -> None:
        """Deliver what is still in the pipe of a command that has ended."""
        while self.read(0.0):
            pass


def take_channel() -> Callable[[Message], None]:
    """For the command: a function that sends one JSON message to the parent, and does nothing without a supervisor.

    To be called once, early: the descriptor is taken out of the environment and kept from further children.
    """
    descriptor = os.environ.pop(CHANNEL, None)
    if descriptor is None:
        return lambda message: None
    os.set_inheritable(int(descriptor), False)

    def tell(message: Message) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(int(descriptor), line) :]

    return tell


def _pipe(stack: contextlib.ExitStack) -> tuple[io.FileIO, io.FileIO]:
    """Reading and writing end of a pipe, closed with the stack; file objects, which may be closed twice."""
    reading, writing = os.pipe()
    return stack.enter_context(io.FileIO(reading, "rb")), stack.enter_context(io.FileIO(writing, "wb"))


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended, leaving it unreaped: its group id stays taken until the group is dealt with."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end_group(guard: subprocess.Popen[bytes], grace_s: float) -> None:
    """TERM to the group, KILL to what is left after the grace, then reap the guard. Does nothing the second time."""
    if guard.returncode is not None:
        return
    if not _has_exited(guard):
        _terminate_group(guard.pid)
        deadline = time.monotonic() + grace_s
        while not _has_exited(guard) and time.monotonic() < deadline:
            time.sleep(0.02)
    _kill_group(guard.pid)
    guard.wait()


def _terminate_group(group: int) -> None:
    """TERM, and CONT: a stopped process hears it only when it goes on."""
    for number in (signal.SIGTERM, signal.SIGCONT):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


def _kill_group(group: int) -> None:
    """KILL to all but its leader and Python's resource trackers, and to these when the trackers have had their chance.

    A tracker unlinks shared memory when those that used it are gone. Nobody else does: killed with them, it leaves
    gigabytes in /dev/shm.
    """
    for pid, command in _members(group):
        if b"resource_tracker" not in command:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _LINGER_S
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _members(group: int) -> list[tuple[int, bytes]]:
    """(pid, command line) of the processes of a group but its leader, dead ones left out."""
    found: list[tuple[int, bytes]] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != group:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                state, _, its_group, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(its_group) == group and state not in "ZX":
                    found.append((int(entry.name), (entry / "cmdline").read_bytes()))
    return found


# ---------------------------------------------------------------------------------------------- the guard


def _guard(lifeline: int, channel: int, grace_s: float, command: list[str]) -> int:
    """Run the command, end the group when the parent's end of the lifeline closes; the command's exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # TERM to the group is meant for the command; the guard outwaits it
    child = subprocess.Popen(command, pass_fds=(channel,), preexec_fn=_prepare_command)
    os.close(channel)
    orphaned = threading.Event()
    threading.Thread(target=_watch, args=(lifeline, grace_s, orphaned), daemon=True).start()
    code = child.wait()
    if orphaned.is_set():
        _kill_group(os.getpgrp())
    return code if code >= 0 else 128 - code


def _prepare_command() -> None:
    """Between fork and exec: die with the guard, and listen to TERM again."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(lifeline: int, grace_s: float, orphaned: threading.Event) -> None:
    os.read(lifeline, 1)  # nothing is ever written: this returns when the parent is gone
    orphaned.set()
    _terminate_group(os.getpgrp())
    time.sleep(grace_s)
    _kill_group(os.getpgrp())


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
