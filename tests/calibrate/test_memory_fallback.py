"""Memory: how samples share passes, how much they hold, and smaller passes when memory runs out."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import TESTS
from support.calibration import STATIC_KV, make_model, run_calibration, with_data, write_dataset
from support.whole_model import CLOSE
from torch import Tensor

from fp8pipe.calibrate import memory
from fp8pipe.calibrate.memory import Batches, batches_of, with_smaller_batches
from fp8pipe.errors import EnvironmentFault
from fp8pipe.oracle.loading import is_out_of_memory
from fp8pipe.progress import ProgressEvent
from fp8pipe.records.calibration import Calibration


def test_samples_of_equal_length_share_a_pass_and_nothing_is_padded() -> None:
    ids = [(1,) * length for length in (5, 7, 5, 5, 300, 7, 5)]
    batches = batches_of(ids, 16)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len({len(ids[index]) for index in batch}) == 1 for batch in batches)
    assert max(len(batch) * len(ids[batch[0]]) for batch in batches if len(batch) > 1) <= 16
    assert batches == [(0, 2, 3), (1, 5), (4,), (6,)]


def test_every_failed_attempt_halves_the_largest_pass_until_each_is_one_sample(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[Batches] = []

    def attempt(batches: Batches) -> None:
        tried.append(batches)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(EnvironmentFault, match="of up to 5 tokens"):
        with_smaller_batches(attempt, [(1,) * 5] * 4, torch.device("cpu"))
    assert tried == [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)]]
    assert caplog.text.count("trying again") == 2


def test_an_error_that_is_not_about_memory_is_not_tried_again() -> None:
    tried: list[Batches] = []

    def attempt(batches: Batches) -> None:
        tried.append(batches)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        with_smaller_batches(attempt, [(1,) * 5] * 4, torch.device("cpu"))
    assert len(tried) == 1


def test_hidden_states_of_all_samples_are_in_memory_twice_at_most(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, tokens, hidden = 20, 18, 64
    data = write_dataset(tmp_path / "data.jsonl", [{"text": "equally long texts"}] * samples)
    monkeypatch.setitem(memory.TOKENS, "cpu", 1)  # every sample is a pass of its own
    most = 0

    def progress(event: ProgressEvent) -> None:
        nonlocal most
        if event.done not in {1.5, 2.5, 4.0}:  # looking takes long
            return
        states = [one for one in gc.get_objects() if type(one) is Tensor and one.shape == (1, tokens, hidden)]
        most = max(most, len({one.untyped_storage().data_ptr() for one in states}))

    run_calibration(llama, with_data(STATIC_KV, data, num_samples=samples), tmp_path / "out", progress)
    assert samples < most <= 2 * samples + 2


_LITTLE_MEMORY = """
import logging, resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from support.calibration import STATIC_KV, run_calibration, with_data
torch.set_num_threads(1)
logging.basicConfig(level=logging.WARNING, format="%(message)s")
def progress(event):  # once all code is loaded and the first layer is done, allow what is in use and a little more
    if event.note == "model.layers.0" and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[5]) * 2**20, resource.RLIM_INFINITY))
recipe = with_data(STATIC_KV, Path(sys.argv[3]), num_samples=int(sys.argv[6]), max_seq_len=256)
run_calibration(Path(sys.argv[2]), recipe, Path(sys.argv[4]), progress)
"""


def with_little_memory(
    model: Path, data: Path, output: Path, megabytes: int, samples: int
) -> subprocess.CompletedProcess[str]:
    arguments = [TESTS, model, data, output, megabytes, samples]
    own = os.environ | {"MALLOC_ARENA_MAX": "1"}  # otherwise each thread reserves 64 MB
    command = [sys.executable, "-c", _LITTLE_MEMORY, *map(str, arguments)]
    return subprocess.run(command, env=own, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with activations of 256 kB per token, much more than their weights."""
    folder = tmp_path_factory.mktemp("wide")
    make_model(folder, "llama", intermediate_size=1 << 16, num_hidden_layers=2)
    return folder


def test_smaller_passes_are_tried_when_memory_runs_out(wide: Path, tmp_path: Path) -> None:
    data = write_dataset(
        tmp_path / "data.jsonl", [{"text": f"sample {index:02} of equal length"} for index in range(40)]
    )
    recipe = with_data(STATIC_KV, data, num_samples=40, max_seq_len=256)
    answer = with_little_memory(wide, data, tmp_path / "little", 330, 40)
    assert answer.returncode == 0, answer.stderr
    assert "ran out of memory with up to 20 samples in a pass" in answer.stderr
    assert "trying again with at most" in answer.stderr
    found = Calibration.load(tmp_path / "little" / "calibration.json")
    assert found.inputs == pytest.approx(run_calibration(wide, recipe, tmp_path / "much").inputs, rel=CLOSE)


def test_a_single_sample_that_does_not_fit_is_an_error_of_the_environment(wide: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.jsonl", [{"text": "x" * 256}] * 2)
    answer = with_little_memory(wide, data, tmp_path / "little", 20, 2)
    assert "EnvironmentFault: out of memory although each pass was a single sample" in answer.stderr
    assert "256 tokens" in answer.stderr


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "CUDA error: out of memory",
    ],
)
def test_out_of_memory_is_recognized_in_the_words_of_every_library(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))
