"""The embedded Prefect server: found when configured, ended with whoever started it."""

from __future__ import annotations

import subprocess
import sys
import urllib.request

import pytest
from support.processes import all_gone, wait_for_descendant

from fp8pipe.errors import ServerFailed
from fp8pipe.machine.loopback import exempt_loopback, proxy_exemption
from fp8pipe.machine.prefect_server import configured_api, prefect_api


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


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/api", "nonsense", "http://[/api"])
def test_a_configured_server_that_does_not_answer_is_named(tmp_path, monkeypatch, address):
    monkeypatch.setenv("PREFECT_API_URL", address)
    with pytest.raises(ServerFailed, match="does not answer"), prefect_api(tmp_path / "log"):
        pass


def test_this_machine_is_never_asked_through_a_proxy(monkeypatch):
    for name in ("no_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "")  # so that it is restored, too
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    assert proxy_exemption() == dict.fromkeys(("NO_PROXY", "no_proxy"), "intranet.example,127.0.0.1,localhost,::1")
    exempt_loopback()
    assert urllib.request.proxy_bypass("127.0.0.1")
    assert not urllib.request.proxy_bypass("huggingface.co")
    assert proxy_exemption() == {}
    monkeypatch.delenv("http_proxy")
    monkeypatch.setenv("NO_PROXY", "")
    assert proxy_exemption() == {}
