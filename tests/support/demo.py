"""A finished demo, and its Hub served again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fp8pipe.config import load_recipe
from fp8pipe.machine import device
from fp8pipe.records import Outcome
from fp8pipe.rehearsal import localhub
from fp8pipe.rehearsal.demo.model import BASE_ID
from fp8pipe.rehearsal.demo.run import recipe_for
from fp8pipe.release.workspace import Workspace
from support.processes import FP8PIPE

RECIPE = load_recipe(recipe_for(device.examine()))
RELEASED = f"{BASE_ID}{RECIPE.repo_suffix}"
CACHE = ["--kv-cache-dtype", "fp8"] if RECIPE.kv_cache else []
"""Arguments of `fp8pipe evaluate` for a checkpoint of the demo."""

SABOTAGED = f"{RELEASED}-sabotaged"


@dataclass(frozen=True)
class Demo:
    """A finished demo."""

    folder: Path
    screen: str
    code: int

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.folder / "work")

    @property
    def outcome(self) -> Outcome:
        (release,) = self.workspace.releases()
        return Outcome.load(release.outcome)

    @property
    def checkpoint(self) -> Path:
        (release,) = self.workspace.releases()
        return release.checkpoint


def run_demo(folder: Path, *arguments: str) -> Demo:
    """`fp8pipe demo`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PREFECT_"))}
    answer = subprocess.run(
        [str(FP8PIPE), "demo", "--workdir", str(folder), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    return Demo(folder, answer.stdout + answer.stderr, answer.returncode)


@contextlib.contextmanager
def hub_of(demo: Demo) -> Iterator[dict[str, str]]:
    """The demo's Hub, served again; yields the environment that leads to it."""
    with localhub.start(demo.folder / "hub") as hub:
        yield os.environ | hub.environment() | {"HF_HOME": str(demo.folder / "hf")}


def on_the_hub(environment: dict[str, str], code: str) -> dict:
    """Run `code` with the unmodified client in a process of its own; it fills the dict `seen`."""
    program = f"import json, huggingface_hub as hf\napi = hf.HfApi()\nseen = {{}}\n{code}\nprint(json.dumps(seen))"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])
