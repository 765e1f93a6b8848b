"""Runs of the engine in processes of their own, killed after some time or before a chosen system call."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Snapshot
from fp8pipe.records.calibration import Calibration

CHILD = """
import json, os, signal, sys, traceback
from pathlib import Path
from fp8pipe.quantize.plan import Plan
from fp8pipe.quantize import quantize
from fp8pipe.records import Snapshot
from fp8pipe.records.calibration import Calibration
import fp8pipe.quantize.engine.run

def write(folder):
    snapshot, plan = Snapshot.load(folder / "snapshot.json"), Plan.load(folder / "plan.json")
    calibration = Calibration.load_if_present(folder / "calibration.json")
    quantize(snapshot, plan, folder / "out", calibration=calibration, threads=2)

def kill_before(event, number, name):
    left = number
    def hook(happening, arguments):
        nonlocal left
        if happening == event:
            path = os.fspath(arguments[1] if event == "os.rename" else arguments[0])
            if path.endswith(name) and (event == "os.rename" or os.path.exists(path)):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

while line := sys.stdin.readline():
    folder, kill = json.loads(line)
    child = os.fork()  # a process of its own for every run, without the seconds that the imports take
    if child == 0:
        try:
            if kill:
                kill_before(**kill)
            write(Path(folder))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Writers:
    """Runs that quantize into FOLDER/out, one after the other. Use as a context manager; `give` tells it what."""

    def __init__(self) -> None:
        self._folder = Path()
        command = [sys.executable, "-c", CHILD]
        self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.communicate()

    def give(self, folder: Path, snapshot: Snapshot, plan: Plan, calibration: Calibration | None = None) -> None:
        """Have the following runs write this into FOLDER/out."""
        self._folder = folder
        snapshot.save(self._folder / "snapshot.json")
        plan.save(self._folder / "plan.json")
        if calibration is not None:
            calibration.save(self._folder / "calibration.json")

    def run(self) -> int:
        """Exit code of an undisturbed run."""
        return self._run({})

    def run_killed_after(self, seconds: float) -> int:
        """Exit code of a run that is killed after `seconds`, if it takes that long."""
        child = self._ask({})
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # its parent has not waited for it yet: the id is still its own
        return self._ask({})

    def run_killed_before(self, event: str, *, number: int = 0, name: str = "") -> int:
        """Exit code of a run that is killed before such a call, after `number` of them.

        `event`: os.remove (of an existing file) or os.rename. `name`: ending of the path removed, or renamed to."""
        return self._run({"event": event, "number": number, "name": name})

    def _run(self, options: dict[str, Any]) -> int:
        self._ask(options)
        return self._ask({})

    def _ask(self, options: dict[str, Any]) -> int:
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(json.dumps([str(self._folder), options]) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())
