"""Requests to a local Hub, by bare HTTP and by the unmodified client."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import httpx

from fp8pipe.rehearsal.localhub import LocalHub, TokenOwner

TOKENS = {
    "hf_ann": TokenOwner("ann", ("acme",)),
    "hf_bob": TokenOwner("bob"),
    "hf_reader": TokenOwner("ann", ("acme",), role="read"),
}


def http_client(hub: LocalHub, token: str | None = "hf_ann") -> httpx.Client:
    """Bare HTTP to a Hub, with a token or None."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=hub.endpoint, headers=headers, timeout=30, trust_env=False)


def with_client(hub: LocalHub, home: Path, script: str, **given: object) -> Any:
    """Run a script in a process of its own, and return the `result` that it sets.

    The script has `api` (an HfApi), `hf` (huggingface_hub), `Path` and the given values.
    """
    code = "import json, huggingface_hub as hf\nfrom pathlib import Path\napi = hf.HfApi()\n"
    code += "".join(f"{name} = {value!r}\n" for name, value in given.items())
    code += textwrap.dedent(script) + "\nprint(json.dumps(result))\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {**hub.environment(), "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def make_repo(http: httpx.Client, name: str, kind: str = "model", **settings: object) -> str:
    """Make the repository acme/`name` with these settings, and return its id."""
    body = {"name": name, "organization": "acme", "type": kind}
    http.post("/api/repos/create", json=body).raise_for_status()
    if settings:
        http.put(f"/api/{kind}s/acme/{name}/settings", json=settings).raise_for_status()
    return f"acme/{name}"


def commit(
    http: httpx.Client, repo: str, files: dict[str, bytes], *, title: str = "files", revision: str = "main", **more: Any
) -> httpx.Response:
    """Commit regular files to a model; `more` are further fields of the commit's header."""
    header = {"key": "header", "value": {"summary": title, **more}}
    lines = [header] + [
        {"key": "file", "value": {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}}
        for path, data in files.items()
    ]
    body = "\n".join(json.dumps(line) for line in lines)
    return http.post(f"/api/models/{repo}/commit/{revision}", content=body)


def head(http: httpx.Client, repo: str) -> str:
    """The commit at the head of main."""
    return http.get(f"/api/models/{repo}").json()["sha"]


def titles(http: httpx.Client, repo: str) -> list[str]:
    """The titles of main's commits, newest first."""
    return [one["title"] for one in http.get(f"/api/models/{repo}/commits/main").json()]


def upload(http: httpx.Client, repo: str, data: bytes) -> str:
    """Upload a large file and return its sha256."""
    oid = hashlib.sha256(data).hexdigest()
    http.put(upload_address(http, repo, oid, len(data)), content=data).raise_for_status()
    return oid


def upload_address(http: httpx.Client, repo: str, oid: str, size: int) -> str:
    """The address to which the Hub wants this large file uploaded."""
    body = {"operation": "upload", "objects": [{"oid": oid, "size": size}]}
    answer = http.post(f"/{repo}.git/info/lfs/objects/batch", json=body)
    return answer.json()["objects"][0]["actions"]["upload"]["href"]
