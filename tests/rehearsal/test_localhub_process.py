"""The local Hub as a process: how it starts, ends, and keeps its state and its secrets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from support.local_hub import TOKENS, commit, http_client, make_repo
from support.processes import FP8PIPE

from fp8pipe.errors import ServerFailed
from fp8pipe.rehearsal.localhub import LocalHub, start


def test_the_state_survives_a_kill(tmp_path: Path) -> None:
    hub = start(tmp_path / "hub")
    with http_client(hub, hub.token) as http:
        repo = make_repo(http, "kept")
        commit(http, repo, {"a.txt": b"1"}).raise_for_status()
        http.post(f"/api/models/{repo}/tag/main", json={"tag": "v1"}).raise_for_status()
        slug = http.post("/api/collections", json={"title": "Kept", "namespace": "acme"}).json()["slug"]
        before = http.get(f"/api/models/{repo}").json()
    os.kill(hub.process.pid, signal.SIGKILL)
    hub.stop()
    (tmp_path / "hub" / "tmp" / "half-written").write_text("litter")
    with start(tmp_path / "hub") as again, http_client(again, hub.token) as http:
        assert http.get(f"/api/models/{repo}").json() == before
        assert http.get(f"/{repo}/resolve/v1/a.txt").content == b"1"
        assert http.get(f"/api/collections/{slug}").json()["title"] == "Kept"
        assert commit(http, repo, {"b.txt": b"2"}, parentCommit=before["sha"]).status_code == 200
        assert not (tmp_path / "hub" / "tmp" / "half-written").exists()


def test_a_hub_ends_with_the_process_that_started_it_but_not_with_the_thread(tmp_path: Path) -> None:
    code = """
import sys, threading, time, urllib.request
from pathlib import Path
from fp8pipe.rehearsal.localhub import start
made = []
thread = threading.Thread(target=lambda: made.append(start(Path(sys.argv[1]))))
thread.start(); thread.join(); time.sleep(0.3)
assert urllib.request.urlopen(made[0].endpoint).status == 200
print(made[0].endpoint, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        endpoint = parent.stdout.readline().strip()
        assert httpx.get(endpoint, trust_env=False).status_code == 200
        parent.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            httpx.get(endpoint, trust_env=False)
        except httpx.TransportError:
            return
        time.sleep(0.05)
    pytest.fail("the Hub outlived the process that started it")


def test_a_hub_that_cannot_start_says_why(local_hub: LocalHub, tmp_path: Path) -> None:
    port = int(local_hub.endpoint.rpartition(":")[2])
    with pytest.raises(ServerFailed, match=f"cannot listen on 127.0.0.1:{port}"):
        start(tmp_path / "other", port=port)
    with pytest.raises(ServerFailed, match="Another process serves the local Hub"):
        start(local_hub.root, log=tmp_path / "second.log")


def test_tokens_stay_out_of_command_line_and_log(local_hub: LocalHub, http: httpx.Client) -> None:
    make_repo(http, "secretive")
    command = Path(f"/proc/{local_hub.process.pid}/cmdline").read_bytes()
    environment = Path(f"/proc/{local_hub.process.pid}/environ").read_bytes()
    assert not any(token.encode() in command + environment + local_hub.log.read_bytes() for token in TOKENS)


def test_hub_serve_says_where_it_serves(tmp_path: Path) -> None:
    command = [str(FP8PIPE), "hub", "serve", "--root", str(tmp_path / "hub"), "--port", "0"]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert served.stdout is not None
    try:
        address = served.stdout.readline().split()[-1]
        variables = dict(one.split("=", 1) for one in served.stdout.readline().split()[1:])
        assert variables["HF_ENDPOINT"] == address
        asked = httpx.get(
            f"{address}/api/whoami-v2", headers={"Authorization": f"Bearer {variables['HF_TOKEN']}"}, trust_env=False
        )
        assert asked.status_code == 200
    finally:
        served.terminate()
        served.communicate()
