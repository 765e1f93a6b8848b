"""Run one command so that no process of it outlives its parent, and report how it ended.

What the command prints goes to a log file; the JSON messages that it sends go to a callback, which may answer. Between
parent and command runs a guard, which is this file run as a script and leads a session and process group of its own:

    parent --- lifeline pipe ---> guard ---> command ---> whatever the command starts

The parent ends the group on a timeout, a stall or any exception. If the parent dies, however suddenly, the lifeline
closes and the guard ends the group. If the guard is killed, PR_SET_PDEATHSIG kills the command. Only the standard
library is imported here, so that the guard starts within milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import math
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CHANNEL = "SUPERVISE_CHANNEL"
"""Environment variable that holds the file descriptor of the command's messages, and of the answers to them."""

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables with the Hub's token."""
NO_LOGIN = {"HF_TOKEN_PATH": os.devnull}
"""Hides the stored login from huggingface_hub."""

GRACE_S = 10.0
"""Time between TERM and KILL."""

_PR_SET_PDEATHSIG = 1
_TICK_S = 0.25
_PATIENCE = 4
"""A command that logs but sends no message is given this many times `stall_s`; one that does neither gets `stall_s`.
When one process of an engine hangs, the others keep logging that they wait for it."""
_LINGER_S = 2.0
"""Time for resource trackers to clean up once the other processes are gone; they need milliseconds."""

Message = dict[str, Any]  # Any: whatever JSON holds
Send = Callable[[Message], None]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a supervised command ended."""

    reason: Literal["exited", "timeout", "stalled"]
    returncode: int
    """Exit status; 128 + N when signal N ended it; -1 when it was ended from here."""
    seconds: float
    log: Path

    @property
    def succeeded(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.reason == "exited" and self.returncode == 0

    @property
    def killed(self) -> bool:
        """Whether a signal ended it, or this function did."""
        return not 0 <= self.returncode < 128

    def tail(self, lines: int = 25) -> str:
        """The last non-empty lines of the log, each cut to 400 characters. Of a line that was drawn again and again, as
        a progress bar is, the last state."""
        text = self.log.read_bytes()[-100_000:].decode(errors="replace")
        drawn = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
        kept = [line.rstrip()[:400] for line in drawn if line.strip()]
        return "\n".join(kept[-lines:])


def without_token(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that must not have the Hub's token."""
    return {name: value for name, value in environment.items() if name not in TOKENS} | NO_LOGIN


def supervise(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    on_message: Callable[[Message], Message | None] = lambda message: None,
    on_tick: Callable[[], None] = lambda: None,
    timeout_s: float | None = None,
    stall_s: float | None = None,
    memory_bytes: int | None = None,
    locks: Sequence[int] = (),
    token: bool = False,
) -> Ending:
    """Run `command`, without standard input, until it ends or has to be ended.

    It is ended after `timeout_s`, not counting the time that it waited for a processor, or when it has neither logged
    nor sent a message for `stall_s`, or has sent none for four times `stall_s`; all in seconds. `env` replaces the
    environment. `on_message` runs in the calling thread; what it returns is the answer to a message that asked for one,
    and the time that it takes is no stall. `on_tick` runs there too, several times a second.
    memory_bytes: private memory of each of its processes; beyond it the kernel refuses them more.
    locks: descriptors that guard and command keep open, so that a lock on them lasts until both have ended.
    token: whether it gets the Hub's token. Only a process that asks the Hub needs it, and none that runs others' code.

    However this function ends, even by an exception (KeyboardInterrupt, a cancelled task), no process of the group
    survives, not even a stopped one, and none of their shared memory: TERM first, KILL after GRACE_S.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        lifeline, _held_open = _pipe(stack)
        messages, messages_end = (stack.enter_context(end) for end in socket.socketpair())
        channel = messages_end.fileno()
        orders = json.dumps([lifeline.fileno(), channel, list(locks), GRACE_S, memory_bytes])
        environment = os.environ if env is None else env
        started = time.monotonic()
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, orders, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**(environment if token else without_token(environment)), CHANNEL: str(channel)},
            pass_fds=(lifeline.fileno(), channel, *locks),
            start_new_session=True,
        )
        stack.callback(_end_group, guard)
        messages_end.close()
        reader = _Reader(messages, log, on_message)
        while True:
            exited = _has_exited(guard)
            reader.read(0.0 if exited else _TICK_S)
            on_tick()
            now = time.monotonic()
            if exited:
                reader.drain()
                _end_group(guard)
                return Ending("exited", guard.returncode, now - started, log)
            if (
                timeout_s is not None
                and (beyond_s := now - started - timeout_s) > 0
                and beyond_s > _waited_s(guard.pid)
            ):
                return Ending("timeout", -1, now - started, log)
            if stall_s is not None and (
                now - reader.last_sign > stall_s or now - reader.last_message > _PATIENCE * stall_s
            ):
                return Ending("stalled", -1, now - started, log)


class _Reader:
    """The parent's end of the channel, and when the command last showed a sign of life."""

    def __init__(self, messages: socket.socket, log: Path, on_message: Callable[[Message], Message | None]) -> None:
        self.last_sign = self.last_message = time.monotonic()
        self._messages, self._log, self._on_message = messages, log, on_message
        self._buffer, self._log_size, self._open = b"", 0, True
        self._selector = selectors.DefaultSelector()
        self._selector.register(messages, selectors.EVENT_READ)

    def read(self, wait_s: float) -> bool:
        """Wait for one chunk and deliver its complete lines; True if there was one."""
        if size := self._log.stat().st_size - self._log_size:
            self._log_size += size
            self.last_sign = time.monotonic()
        if not self._open:
            time.sleep(min(wait_s, 0.02))  # the command has closed the channel: it is about to end
            return False
        if not self._selector.select(wait_s):
            return False
        chunk = _received(self._messages)
        self._open = bool(chunk)
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for line in lines:
            answer = self._on_message(json.loads(line))
            self.last_sign = self.last_message = time.monotonic()
            if answer is not None:
                with contextlib.suppress(BrokenPipeError):  # it ended before it was answered
                    self._messages.sendall(_line(answer))
        return bool(chunk)

    def drain(self) -> None:
        """Deliver what is left in the channel of a command that has ended."""
        while self.read(0.0):
            pass


class Channel:
    """The command's end of its line to the parent. Without a supervisor nothing is sent, and nobody answers."""

    def __init__(self, descriptor: int | None) -> None:
        self._socket = socket.socket(fileno=descriptor) if descriptor is not None else None

    def __call__(self, message: Message) -> None:
        """Send one message."""
        if self._socket is not None:
            self._socket.sendall(_line(message))

    def ask(self, message: Message) -> Message | None:
        """Send a message and wait for its answer; None if the parent is gone."""
        self(message)
        answer = b""
        while self._socket is not None and not answer.endswith(b"\n") and (chunk := _received(self._socket)):
            answer += chunk
        return json.loads(answer) if answer.endswith(b"\n") else None


def take_channel() -> Channel:
    """The channel to the parent.

    For the command, to be called once and early: it takes the descriptor out of the environment, so that processes
    which the command starts do not inherit it.
    """
    descriptor = os.environ.pop(CHANNEL, None)
    if descriptor is None:
        return Channel(None)
    os.set_inheritable(int(descriptor), False)
    return Channel(int(descriptor))


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _received(channel: socket.socket) -> bytes:
    """What has come; empty once the other end is closed."""
    try:
        return channel.recv(65536)
    except ConnectionResetError:  # it was closed before it read the last answer
        return b""


def _pipe(stack: contextlib.ExitStack) -> tuple[io.FileIO, io.FileIO]:
    """Reading and writing end of a pipe, closed with the stack; as file objects, since those may be closed twice."""
    reading, writing = os.pipe()
    return stack.enter_context(io.FileIO(reading, "rb")), stack.enter_context(io.FileIO(writing, "wb"))


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended. It is not reaped, so that no other group can get its id before ours is ended."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end_group(guard: subprocess.Popen[bytes]) -> None:
    """TERM to the group, KILL to what is left after the grace, then reap the guard. Does nothing the second time."""
    if guard.returncode is not None:
        return
    if not _has_exited(guard):
        _terminate_group(guard.pid)
        deadline = time.monotonic() + GRACE_S
        while not _has_exited(guard) and time.monotonic() < deadline:
            time.sleep(0.02)
    _kill_group(guard.pid)
    guard.wait()


def _terminate_group(group: int) -> None:
    """TERM, then CONT: a stopped process gets TERM only once it continues."""
    for number in (signal.SIGTERM, signal.SIGCONT):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


def _kill_group(group: int) -> None:
    """KILL all but the group's leader and Python's resource trackers; then, a moment later, these too.

    A tracker unlinks shared memory once its users are gone, and nobody else does. If it were killed with them,
    gigabytes would stay in /dev/shm.
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
    """(pid, command line) of the living processes of a group, without its leader."""
    found: list[tuple[int, bytes]] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != group:
            with contextlib.suppress(OSError):  # it has just ended
                state, _, its_group, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(its_group) == group and state not in "ZX":
                    found.append((int(entry.name), (entry / "cmdline").read_bytes()))
    return found


def _waited_s(group: int) -> float:
    """Seconds that the group's first threads waited for a processor while others ran: its leader's, which starts the
    command, and the most of the others'. 0 where the kernel does not tell (CONFIG_SCHED_INFO), and infinite without a
    command: it has just ended, and the leader is about to."""

    def delay_ns(pid: int) -> int:
        try:
            return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
        except (OSError, IndexError):  # it has just ended, or the kernel does not tell
            return 0

    return (delay_ns(group) + max((delay_ns(pid) for pid, _ in _members(group)), default=math.inf)) / 1e9


# ---------------------------------------------------------------------------------------------- the guard


def _guard(
    lifeline: int, channel: int, locks: list[int], grace_s: float, memory_bytes: int | None, command: list[str]
) -> int:
    """Run the command and return its exit status; end the group if the parent's end of the lifeline closes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # TERM to the group is for the command; the guard outlives it
    child = subprocess.Popen(command, pass_fds=(channel, *locks), preexec_fn=lambda: _prepare_command(memory_bytes))
    os.close(channel)
    orphaned = threading.Event()
    threading.Thread(target=_watch, args=(lifeline, grace_s, orphaned), daemon=True).start()
    code = child.wait()
    if orphaned.is_set():
        _kill_group(os.getpgrp())
    return code if code >= 0 else 128 - code


def _prepare_command(memory_bytes: int | None) -> None:
    """Between fork and exec: die with the guard, react to TERM again, and have no more memory than is allowed."""
    if memory_bytes:  # private memory: what is only reserved, as by CUDA, does not count
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(lifeline: int, grace_s: float, orphaned: threading.Event) -> None:
    os.read(lifeline, 1)  # nothing is ever written: this returns when the parent is gone
    orphaned.set()
    _terminate_group(os.getpgrp())
    time.sleep(grace_s)
    _kill_group(os.getpgrp())


if __name__ == "__main__":
    sys.exit(_guard(*json.loads(sys.argv[1]), command=sys.argv[2:]))
