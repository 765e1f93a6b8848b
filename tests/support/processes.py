"""Processes that tests start, and whether they are gone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

FP8PIPE = Path(sys.executable).with_name("fp8pipe")


def importing_the_repository() -> dict[str, str]:
    """The environment of a script that imports `benchmarks` or `tests`: only pytest itself has their folder on its
    path."""
    folders = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(pids: Iterable[int]) -> bool:
    """Whether all of them end within half a minute."""
    deadline = time.monotonic() + 30
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(running(pid) for pid in pids)


def peak_memory_mb(code: str, *arguments: str) -> int:
    """Peak memory of a process that runs `code`. Its rusage would also count the process that forked it."""
    code += "\nprint(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1000)"
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    return int(child.stdout.splitlines()[-1])


def processes() -> dict[int, tuple[int, str]]:
    """All processes: pid -> (pid of the parent, command line)."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid, state = int(entry.name), (entry / "stat").read_text().rpartition(")")[2].split()
            found[pid] = int(state[1]), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def family(roots: Iterable[int]) -> dict[int, str]:
    """These processes, what they started, and what those started: pid -> command line."""
    everything = processes()
    found = {pid for pid in roots if pid in everything}
    while more := {pid for pid, (parent, _) in everything.items() if parent in found} - found:
        found |= more
    return {pid: everything[pid][1] for pid in found}


def wait_for_descendant(root: int, words: str) -> dict[int, str]:
    """The family of the process, as soon as a member has `words` in its command line."""
    deadline = time.monotonic() + 120
    while True:
        found = family([root])
        if any(words in command for command in found.values()):
            return found
        assert running(root) and time.monotonic() < deadline, f"{words!r} was not started: {found}"
        time.sleep(0.02)
