"""What a foreign config may make transformers and vLLM build: no more than its files can hold, in bounded memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
from support.processes import FP8PIPE, all_gone, wait_for_descendant
from support.tiny_models import make_model

from fp8pipe.errors import MalformedCheckpoint
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.oracle import bounds, transformers_probe
from fp8pipe.oracle.disk import Unsupported
from fp8pipe.oracle.transformers import inspect


def with_config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def examine(folder: Path) -> None:
    shapes = {info.name: list(info.shape) for info in read_headers(resolve(str(folder))).tensors.values()}
    transformers_probe.examine(folder, shapes, False)


@pytest.mark.parametrize("name", ["llama", "qwen3", "lfm2"])
def test_model_of_more_parts_than_its_files_can_hold_is_not_built(tmp_path: Path, name: str) -> None:
    folder = with_config(make_model(tmp_path / "model", name), num_hidden_layers=10_000, layer_types=None)
    with pytest.raises(Unsupported, match=r"more than 20\d+ modules and parameters, and \d+ tensors are on disk"):
        examine(folder)


def test_number_of_layers_that_no_model_has_reaches_no_library(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    with_config(folder, text_config={"layers": [{"num_hidden_layers": 1_000_000_000}]})
    with pytest.raises(MalformedCheckpoint, match=r"num_hidden_layers: 1000000000, more layers than any model has"):
        inspect(resolve(str(folder)))


@pytest.mark.parametrize("count", ["2", 2.5])
def test_number_of_layers_that_is_no_whole_number_reaches_no_library(tmp_path: Path, count: object) -> None:
    folder = with_config(make_model(tmp_path / "model"), num_hidden_layers=count)
    with pytest.raises(MalformedCheckpoint, match=r"num_hidden_layers: .*, not a whole number"):
        inspect(resolve(str(folder)))


def test_config_that_unfolds_into_gigabytes_is_stopped(tmp_path: Path) -> None:
    """Its class draws a list with an entry for each label."""
    folder = with_config(make_model(tmp_path / "model"), num_labels=1_000_000_000)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(Unsupported, match="GB to build without weights, and 21 tensors"):
        examine(folder)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_limits_end_with_the_building() -> None:
    from torch import nn

    with bounds.building(0), pytest.raises(bounds.TooLarge):
        nn.ModuleList(nn.Linear(1, 1) for _ in range(10_000))
    nn.ModuleList(nn.Linear(1, 1) for _ in range(10_000))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_probe_dies_with_the_command_that_started_it(tmp_path: Path, number: signal.Signals) -> None:
    folder = make_model(tmp_path / "model")
    command = [FP8PIPE, "plan", folder, "--recipe", "fp8-dynamic"]
    environment = os.environ | {"FP8PIPE_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        members = wait_for_descendant(parent.pid, "transformers_probe")
        parent.send_signal(number)
    assert all_gone(members)
