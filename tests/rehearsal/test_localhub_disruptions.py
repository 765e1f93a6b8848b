"""The local Hub disrupted on purpose: each disruption does what it says."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.local_hub import commit, http_client, make_repo, titles, upload, with_client

from fp8pipe.rehearsal.localhub import Disruption, LocalHub, start


def test_a_lost_answer_hides_a_commit_that_was_made(http: httpx.Client, broken: Any) -> None:
    repo = make_repo(http, "lost")
    broken(Disruption("/api/models/acme/lost/commit/", "drop-after", method="POST"))
    with pytest.raises(httpx.RemoteProtocolError):
        commit(http, repo, {"a.txt": b"1"}, title="release")
    assert titles(http, repo) == ["release", "initial commit"]
    assert commit(http, repo, {"a.txt": b"1"}, title="release").status_code == 200
    assert titles(http, repo) == ["release", "initial commit"]


def test_a_dropped_request_did_nothing(http: httpx.Client, broken: Any) -> None:
    repo = make_repo(http, "dropped")
    broken(Disruption("/dropped/commit/", "drop-before"))
    with pytest.raises(httpx.RemoteProtocolError):
        commit(http, repo, {"a.txt": b"1"})
    assert titles(http, repo) == ["initial commit"]


def test_disruptions_strike_the_requests_that_they_name(http: httpx.Client, broken: Any) -> None:
    repo = make_repo(http, "counted")
    broken(Disruption("/counted/commit/", "status", after=1, times=2, status=412), Disruption("/elsewhere", "status"))
    answers = [commit(http, repo, {"a.txt": str(number).encode()}).status_code for number in range(5)]
    assert answers == [200, 412, 412, 200, 200]
    assert [disruption["met"] for disruption in http.get("/_disruptions").json()] == [5, 0]


def test_the_client_retries_a_failed_upload(
    local_hub: LocalHub, http: httpx.Client, broken: Any, tmp_path: Path
) -> None:
    make_repo(http, "retried")
    broken(
        Disruption("^/_lfs/[0-9a-f]", "status", method="PUT", status=500),
        Disruption("^/_lfs/", "slow", delay_s=0.01, times=9),
    )
    script = """
    api.create_commit("acme/retried", [hf.CommitOperationAdd("w.bin", bytes(300_000))], commit_message="w")
    result = Path(api.hf_hub_download("acme/retried", "w.bin")).read_bytes() == bytes(300_000)
    """
    assert with_client(local_hub, tmp_path, script)
    assert http.get("/_disruptions").json()[0]["met"] == 2


def test_a_corrupted_blob_keeps_its_name_and_changes_its_bytes(http: httpx.Client, broken: Any) -> None:
    repo = make_repo(http, "corrupted")
    broken(Disruption("^/_lfs/[0-9a-f]", "corrupt", method="PUT"))
    data = os.urandom(5000)
    oid = upload(http, repo, data)
    lfs = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": oid, "size": len(data)}}
    body = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "x"}}, lfs]))
    http.post(f"/api/models/{repo}/commit/main", content=body).raise_for_status()
    served = http.get(f"/{repo}/resolve/main/w.bin")
    assert served.headers["ETag"] == f'"{oid}"'
    assert len(served.content) == len(data)
    assert hashlib.sha256(served.content).hexdigest() != oid


def test_a_hub_without_disruptions_has_no_address_for_them(tmp_path: Path) -> None:
    with start(tmp_path / "hub") as hub, http_client(hub, hub.token) as http:
        assert http.get("/_disruptions").status_code == 404
        assert http.get("/api/whoami-v2").json()["name"] == "local"
