"""What a GPU's memory holds: the next layer while one is computed, and hidden states, or their storage on the host.

The copies are made on the CPU here; streams and pinned memory are all that a GPU adds to them."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import STATIC_KV, TENSOR_KV, make_model, run_calibration, with_data, write_dataset
from torch import Tensor

from fp8pipe.calibrate import forward, memory
from fp8pipe.calibrate.lockstep import Pass
from fp8pipe.calibrate.memory import Placement, placement, placement_in
from fp8pipe.calibrate.moves import Moves
from fp8pipe.calibrate.skeleton import Skeleton
from fp8pipe.calibrate.waiting import HiddenStates
from fp8pipe.config import Recipe
from fp8pipe.errors import SourceChanged
from fp8pipe.progress import ProgressEvent, quiet

GB = 10**9
SMALL_GPU = Placement(load_ahead=True, hidden_on_host=True)


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "placement", lambda *_, **__: SMALL_GPU)


def test_the_cpu_keeps_hidden_states_and_one_layer() -> None:
    assert placement(Moves(torch.device("cpu")), layer=GB, hidden=GB) == Placement(False, False)


@pytest.mark.parametrize(
    ("free", "layer", "hidden", "expected"),
    [
        (80 * GB, GB // 2, 17 * GB, Placement(load_ahead=True, hidden_on_host=False)),  # 8B on an H100
        (80 * GB, 2 * GB, 34 * GB, Placement(load_ahead=True, hidden_on_host=False)),  # 70B
        (24 * GB, 2 * GB, 34 * GB, Placement(load_ahead=True, hidden_on_host=True)),  # 70B on a card of 24 GB
        (80 * GB, 23 * GB, 30 * GB, Placement(load_ahead=False, hidden_on_host=True)),  # 671B
    ],
)
def test_half_of_the_memory_is_left_to_compute_in(free: int, layer: int, hidden: int, expected: Placement) -> None:
    assert placement_in(free, layer=layer, hidden=hidden) == expected


CASES: dict[str, Recipe] = {
    "llama": STATIC_KV,
    "gemma3": STATIC_KV,
    "mixtral": TENSOR_KV,
    "deepseek_v3": TENSOR_KV,
    "bloom": TENSOR_KV.model_copy(update={"kv_cache": None}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_small_gpu_measures_the_same_to_the_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "model", name)
    recipe = with_data(CASES[name], write_dataset(tmp_path / "data.jsonl"))
    expected = run_calibration(tmp_path / "model", recipe, tmp_path / "expected")
    monkeypatch.setattr(forward, "placement", lambda *_, **__: SMALL_GPU)
    found = run_calibration(tmp_path / "model", recipe, tmp_path / "found")
    assert found.digest() == expected.digest()
    assert (found.weights, found.sensitivity) == (expected.weights, expected.sensitivity)


@pytest.mark.usefixtures("small_gpu")
def test_only_passes_that_run_have_hidden_states_on_the_device(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, tokens, hidden = 20, 18, 64
    data = write_dataset(tmp_path / "data.jsonl", [{"text": "equally long texts"}] * samples)
    monkeypatch.setitem(memory.TOKENS, "cpu", 1)  # every sample is a pass of its own
    held: list[tuple[int, int]] = []

    def progress(event: ProgressEvent) -> None:
        if event.done in {1.5, 2.5, 4.0}:  # looking takes long
            states = [one for one in gc.get_objects() if type(one) is Tensor and one.shape == (1, tokens, hidden)]
            held.append((len(states), sum(one.untyped_storage().nbytes() > 0 for one in states)))

    run_calibration(llama, with_data(STATIC_KV, data, num_samples=samples), tmp_path / "out", progress)
    assert [alive > samples for alive, _ in held] == [True, True, False]  # at the end all passes have ended
    assert max(filled for _, filled in held) <= 6  # embeddings and hidden states of two passes, and temporary ones


@pytest.mark.usefixtures("small_gpu")
def test_an_interrupted_calibration_resumes_with_hidden_states_from_the_host(llama: Path, tmp_path: Path) -> None:
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))

    def interrupt(event: ProgressEvent) -> None:
        if event.done > 2.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_calibration(llama, recipe, tmp_path / "out", interrupt)
    notes: list[str] = []
    resumed = run_calibration(llama, recipe, tmp_path / "out", lambda event: notes.append(event.note))
    assert list(dict.fromkeys(notes)) == ["model.layers.2", "model.layers.3"]
    assert resumed.digest() == run_calibration(llama, recipe, tmp_path / "undisturbed").digest()


def test_hidden_states_come_back_to_the_bit_in_the_tensor_that_the_model_holds() -> None:
    moves = Moves(torch.device("cpu"))
    states = HiddenStates(moves, on_host=True)
    passes = [Pass(lambda: None) for _ in range(3)]
    expected = [torch.randn(2, 3, 8).transpose(1, 2) for _ in passes]
    for one, values in zip(passes, expected, strict=True):
        one.layer, one.args = "layer", (values.clone(memory_format=torch.preserve_format),)
        states.park(one)
    assert [one.hidden.untyped_storage().nbytes() for one in passes] == [0, 0, 0]
    assert all(torch.equal(states.read(one), values) for one, values in zip(passes, expected, strict=True))
    for one, values in zip(states.each(passes), expected, strict=True):
        assert torch.equal(one.hidden, values)
        one.layer = None
        states.park(one)
        assert one.hidden.untyped_storage().nbytes() > 0  # a pass that has ended keeps what it has


def _loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What is done with layers, in order: load or drop, the layer, the thread."""
    done: list[tuple[str, str, str]] = []
    for what in ("load", "drop"):
        original = getattr(Skeleton, what)

        def noted(self: Skeleton, layer: str, original: Any = original, what: str = what) -> Any:
            done.append((what, layer.rpartition(".")[2], threading.current_thread().name))
            return original(self, layer)

        monkeypatch.setattr(Skeleton, what, noted)
    return done


@pytest.mark.usefixtures("small_gpu")
def test_the_next_layer_is_loaded_by_a_thread_before_the_last_one_is_dropped(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _loads(monkeypatch)
    run_calibration(llama, with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl")), tmp_path / "out")
    steps = [f"{what} {layer}" for what, layer, _ in done]
    assert sorted(steps) == sorted(f"{what} {layer}" for what in ("load", "drop") for layer in range(4))
    assert all(steps.index(f"load {layer + 1}") < steps.index(f"drop {layer}") for layer in range(3))
    assert [thread.startswith("load-ahead") for what, _, thread in done if what == "load"] == [False, True, True, True]


@pytest.mark.usefixtures("small_gpu")
def test_what_fails_while_a_layer_is_loaded_ahead_is_raised_and_leaves_no_thread(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Skeleton.load

    def load(self: Skeleton, layer: str) -> Any:
        if layer == "model.layers.2":
            raise SourceChanged("while it was read")
        return original(self, layer)

    monkeypatch.setattr(Skeleton, "load", load)
    before = threading.active_count()
    with pytest.raises(SourceChanged, match="while it was read"):
        run_calibration(llama, with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl")), tmp_path / "out", quiet)
    assert threading.active_count() == before
