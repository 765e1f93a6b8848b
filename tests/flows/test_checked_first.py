"""What the Hub would refuse ends a run before anything is calibrated, quantized or measured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.processes import FP8PIPE
from support.sample_folders import write_model

from fp8pipe.hub.client import client
from fp8pipe.rehearsal import localhub
from fp8pipe.rehearsal.localhub import TokenOwner

COLLECTION = """
collection: {namespace: acme, title: FP8}
models: [{id: acme/base}, {id: acme/base, overrides: {repo_id: strangers/base-FP8}}]
recipes: [fp8-dynamic]
suite: demo
policy: demo
work_dir: WORK
"""


@pytest.mark.prefect
def test_a_batch_with_a_token_that_may_not_publish_does_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = {"write": TokenOwner("ann", ("acme",)), "read": TokenOwner("ann", ("acme",), "read")}
    (tmp_path / "collection.yaml").write_text(COLLECTION.replace("WORK", str(tmp_path / "work")))
    with localhub.start(tmp_path / "hub", tokens=tokens) as hub:
        for name, value in (hub.environment() | {"HF_TOKEN": "write"}).items():
            monkeypatch.setenv(name, value)
        client().create_repo("acme/base")
        client().upload_folder(repo_id="acme/base", folder_path=write_model(tmp_path / "model"))
        own = {
            "COLUMNS": "400",
            "HF_TOKEN": "read",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "PREFECT_HOME": str(tmp_path / "prefect"),
        }
        command = [str(FP8PIPE), "batch", str(tmp_path / "collection.yaml")]
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout.count("may only read") == 2, done.stdout
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"logs"}
