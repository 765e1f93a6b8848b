"""The embedded Prefect server: found when configured, ended with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp8pipe.machine.prefect_server import configured_api


def test_api_is_found_in_the_environment_before_the_profile(tmp_path):
    (tmp_path / "profiles.toml").write_text('active = "a"\n[profiles.a]\nPREFECT_API_URL = "http://profile/api"\n')
    assert configured_api({"PREFECT_HOME": str(tmp_path)}) == "http://profile/api"
    assert configured_api({"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": "http://env/api"}) == "http://env/api"


def test_no_api_is_configured_in_a_fresh_home(tmp_path):
    assert configured_api({"PREFECT_HOME": str(tmp_path)}) is None


@pytest.mark.prefect
def test_server_ends_when_its_starter_is_killed(tmp_path):
    program = (
        "import time\nfrom pathlib import Path\nfrom fp8pipe.machine.prefect_server import EmbeddedServer\n"
        f"server = EmbeddedServer(Path({str(tmp_path / 'log')!r}), Path({str(tmp_path / 'home')!r}))\n"
        "print(server._process.pid, flush=True)\ntime.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    server = int(starter.stdout.readline())
    while "prefect" not in Path(f"/proc/{server}/cmdline").read_text():
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and alive(server):
        time.sleep(0.1)
    assert not alive(server)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
