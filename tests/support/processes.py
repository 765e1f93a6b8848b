"""Processes that tests start, and whether they are gone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 30
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(running(pid) for pid in pids)


FP8PIPE = Path(sys.executable).with_name("fp8pipe")


def peak_memory_mb(code: str, *arguments: str) -> int:
    """Peak memory of a process that runs `code`. Its rusage would also count the process that forked it."""
    code += "\nprint(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1000)"
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    return int(child.stdout.splitlines()[-1])
