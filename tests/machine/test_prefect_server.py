"""The embedded Prefect server: found when configured, ended with whoever started it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.processes import all_gone, wait_for_descendant

from fp8pipe.machine.prefect_server import configured_api


@pytest.fixture(autouse=True)
def fresh_home(tmp_path, monkeypatch):
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))


def test_api_is_found_in_the_environment_before_the_profile(tmp_path, monkeypatch):
    (tmp_path / "profiles.toml").write_text('active = "a"\n[profiles.a]\nPREFECT_API_URL = "http://profile/api"\n')
    assert configured_api() == "http://profile/api"
    monkeypatch.setenv("PREFECT_API_URL", "http://env/api")
    assert configured_api() == "http://env/api"


def test_no_api_is_configured_in_a_fresh_home():
    assert configured_api() is None


@pytest.mark.prefect
def test_server_ends_when_its_starter_is_killed(tmp_path):
    program = (
        "import time\nfrom pathlib import Path\nfrom fp8pipe.machine.prefect_server import EmbeddedServer\n"
        f"EmbeddedServer(Path({str(tmp_path / 'log')!r}), Path({str(tmp_path / 'home')!r}))\ntime.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", program])
    started = wait_for_descendant(starter.pid, "-m prefect server start")
    starter.kill()
    starter.wait()
    assert all_gone(started)
