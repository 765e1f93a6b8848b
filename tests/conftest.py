"""Fixtures that several rooms' tests share: a clean environment, a Hub on loopback, tiny models, the demo.

What is expensive is made once for the whole run (`scope="session"`); tests must not write into it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.demo import Demo, run_demo
from support.tiny_models import make_model
from support.warm_python import warm_interpreter

from fp8pipe.rehearsal import localhub
from fp8pipe.rehearsal.localhub import Disruption, LocalHub

FOREIGN = ("HF_", "HUGGING_FACE_", "PREFECT_", "FP8PIPE_", "VLLM_", "TRANSFORMERS_")
"""Prefixes of variables that change what is tested."""
OURS = ("FP8PIPE_LONG",)
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True, scope="session")
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No setting of the person who runs the tests reaches them, or a process that they start."""
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if (name.startswith(FOREIGN) and name not in OURS) or name.lower() in PROXIES:
                patch.delenv(name)
        patch.setenv("FP8PIPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("FP8PIPE_LOCKS", str(tmp_path_factory.mktemp("locks")))  # no engine waits for another test's
        # Two threads of an engine wait for each other beside other work, which makes tiny models ten times slower.
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def running_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """One server for the whole run; tests keep out of each other's way by repository names."""
    with localhub.start(tmp_path_factory.mktemp("hub"), disruptions=True) as server:
        yield server


@pytest.fixture
def hub(running_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    """The Hub that this process now talks to, with a token and a cache of its own."""
    for name, value in running_hub.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-login"))
    return running_hub


@pytest.fixture
def break_hub(hub: LocalHub) -> Iterator[Callable[..., None]]:
    """`break_hub(Disruption(...), ...)` disrupts the Hub until the test ends."""

    def set_disruptions(*disruptions: Disruption) -> None:
        body = json.dumps([asdict(disruption) for disruption in disruptions]).encode()
        with urllib.request.urlopen(
            urllib.request.Request(f"{hub.endpoint}/_disruptions", body, method="POST")
        ) as answer:
            assert answer.status == 200

    yield set_disruptions
    set_disruptions()


@pytest.fixture
def repo_id(request: pytest.FixtureRequest) -> str:
    """A repository name that no other test uses."""
    node = request.node
    return f"acme/{node.originalname[:40].strip('_')}-{hashlib.sha256(node.name.encode()).hexdigest()[:8]}"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_folder("qwen3")`: a folder with that tiny model, made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(name: str = "llama", **changes: Any) -> Path:
        key = (name, *sorted(changes.items()))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(name), name, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Python interpreter that has imported vLLM already, for tests that need an engine but not its own process."""
    with warm_interpreter(tmp_path_factory.mktemp("warm")) as python:
        yield python


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """One run of `fp8pipe demo`, accepted and published."""
    made = run_demo(tmp_path_factory.mktemp("demo") / "demo")
    assert made.code == 0, made.screen
    return made


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base model, trained once for every test that asks for it."""
    from fp8pipe.rehearsal.demo import model

    return model.build_base(tmp_path_factory.mktemp("demo-base") / "model")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a checkpoint as long as no engine loads it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder
