"""A Python interpreter in which vLLM and lm-eval are imported already: its runs are forked from a warm process.

Importing them takes 10 s and more, which is most of the time that many tests take. `warm_interpreter` starts the warm
process and yields an executable that takes `-m MODULE ARGS` or `SCRIPT ARGS`, as python does. Use it where a test needs
a real engine but is not about its process: a run ends with its caller, but is not in the caller's process group.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLIENT = """\
#!{python} -IS
import json, os, socket, sys
if sys.argv[1].startswith("-") and sys.argv[1] != "-m":  # such as the guard of `supervise`
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
run = {{"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}
channel = os.environ.get("SUPERVISE_CHANNEL")
with socket.socket(socket.AF_UNIX) as warm:
    warm.connect({address!r})
    socket.send_fds(warm, [b"run "], [1, 2] + ([int(channel)] if channel else []))
    warm.sendall(json.dumps(run).encode() + b"\\n")
    status = int(warm.recv(16) or b"1")
if status < 0:
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


@contextlib.contextmanager
def warm_interpreter(folder: Path) -> Iterator[str]:
    """Path of the interpreter, which works inside the context. `folder` gets its socket and log."""
    program, address, log = folder / "python", str(folder / "socket"), folder / "log"
    program.write_text(CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener, log.open("wb") as output:
        listener.bind(address)
        listener.listen()
        command = [sys.executable, __file__, str(listener.fileno())]
        warm = subprocess.Popen(command, stdout=output, stderr=output, pass_fds=(listener.fileno(),))
        try:
            yield str(program)
        finally:
            warm.kill()
            warm.wait()


# ---------------------------------------------------------------------------------------------- the warm process


def serve(listener: socket.socket) -> None:
    """Import what is slow, then fork for each run."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    from fp8pipe.evaluate.environment import prepare_process, use_cpu_engine

    environment = dict(os.environ)
    prepare_process()
    use_cpu_engine()
    import fp8pipe.evaluate.engine
    import fp8pipe.evaluate.tasks  # noqa: F401

    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            attend(connection)
        connection.close()


def attend(connection: socket.socket) -> None:
    """Fork again: the child becomes the run; this process reports its status, or ends it when the client is gone."""
    _, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile() as lines:
        run = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        become(run, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    finished = os.pidfd_open(pid)
    if connection in select.select([connection, finished], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(str(status).encode())
    os._exit(0)


def become(run: dict[str, Any], descriptors: list[int]) -> None:
    """Run what python would have run, and exit with its status."""
    os.dup2(descriptors[0], 1)
    os.dup2(descriptors[1], 2)
    os.chdir(run["cwd"])
    os.environ.clear()
    os.environ.update(run["env"])
    if len(descriptors) == 3:
        os.environ["SUPERVISE_CHANNEL"] = str(descriptors[2])
    status = 0
    try:
        if run["argv"][0] == "-m":
            sys.argv = run["argv"][1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = run["argv"]
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
