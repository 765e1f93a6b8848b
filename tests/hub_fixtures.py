"""A real Hub on loopback for tests, and the environment that leads to it. Use: `pytest_plugins = ["hub_fixtures"]`."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from fp8pipe.rehearsal import localhub
from fp8pipe.rehearsal.localhub import Fault, LocalHub


@pytest.fixture(scope="session")
def running_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """One server for the whole run; tests keep out of each other's way by repository names."""
    with localhub.start(tmp_path_factory.mktemp("hub"), faults=True) as server:
        yield server


@pytest.fixture
def hub(running_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    """The Hub that this process now talks to, with a token and a cache of its own."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
        monkeypatch.delenv(name)
    for name, value in running_hub.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-login"))
    return running_hub


@pytest.fixture
def break_hub(hub: LocalHub) -> Iterator[Callable[..., None]]:
    """`break_hub(Fault(...), ...)` makes the Hub fail that way; mended when the test ends."""

    def set_faults(*faults: Fault) -> None:
        body = json.dumps([asdict(fault) for fault in faults]).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{hub.endpoint}/_faults", body, method="POST")) as answer:
            assert answer.status == 200

    yield set_faults
    set_faults()


@pytest.fixture
def repo_id(request: pytest.FixtureRequest) -> str:
    """A repository name that no other test uses."""
    node = request.node
    return f"acme/{node.originalname[:40].strip('_')}-{hashlib.sha256(node.name.encode()).hexdigest()[:8]}"
