"""Flows that tests run on a Prefect server of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.processes import importing_the_repository

_RUN = """
import sys
from pathlib import Path
from fp8pipe.machine.prefect_server import prefect_api
home = Path(sys.argv[1])
with prefect_api(home / "server.log", home) as server:
    server.ready()
    exec(sys.argv[2])
"""


def run_flow(code: str, home: Path, **environment: str) -> str:
    """Run `code`, which calls a flow, in a process with its own Prefect server. Returns what it printed."""
    own = importing_the_repository() | environment
    done = subprocess.run([sys.executable, "-c", _RUN, str(home), code], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
