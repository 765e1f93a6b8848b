"""A killed calibration resumes after its last finished layer, where that is safe, and ends with the same ranges."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import TESTS
from support.calibration import STATIC_KV, TENSOR_KV, make_model, run_calibration, with_data, write_dataset

from fp8pipe.calibrate.lockstep import Pass
from fp8pipe.calibrate.resume import Bookmark, Handover
from fp8pipe.progress import ProgressEvent
from fp8pipe.records.calibration import Ranges

_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from support.calibration import STATIC_KV, run_calibration, with_data
torch.set_num_threads(int(sys.argv[5]))
def progress(event):
    if event.note == "model.layers.2" and event.done > 2.5:
        os.kill(os.getpid(), signal.SIGKILL)
run_calibration(Path(sys.argv[2]), with_data(STATIC_KV, Path(sys.argv[3])), Path(sys.argv[4]), progress)
"""


def test_finished_layers_are_not_repeated_after_kill_9(llama: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.jsonl")
    arguments = [TESTS, llama, data, tmp_path / "out", torch.get_num_threads()]
    child = subprocess.run([sys.executable, "-c", _KILLED, *map(str, arguments)], env=os.environ, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert not (tmp_path / "out" / "calibration.json").exists()

    recipe = with_data(STATIC_KV, data)
    events: list[ProgressEvent] = []
    resumed = run_calibration(llama, recipe, tmp_path / "out", events.append)
    assert {event.note for event in events} == {"model.layers.2", "model.layers.3"}
    assert resumed.digest() == run_calibration(llama, recipe, tmp_path / "undisturbed").digest()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["calibration.json"]


def test_layers_are_repeated_where_they_return_more_than_hidden_states(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "bloom")  # whose layers also return attention weights
    recipe = TENSOR_KV.model_copy(update={"kv_cache": None})
    recipe = with_data(recipe, write_dataset(tmp_path / "data.jsonl"))

    def interrupt(event: ProgressEvent) -> None:
        if event.done > 2.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_calibration(tmp_path / "model", recipe, tmp_path / "out", interrupt)
    notes: list[str] = []
    resumed = run_calibration(tmp_path / "model", recipe, tmp_path / "out", lambda event: notes.append(event.note))
    assert list(dict.fromkeys(notes)) == [f"transformer.h.{layer}" for layer in range(4)]
    assert resumed.digest() == run_calibration(tmp_path / "model", recipe, tmp_path / "undisturbed").digest()


def test_a_restart_begins_only_where_hidden_states_are_all_that_is_handed_over() -> None:
    one, output, shared = Pass(lambda: None), torch.ones(2, 3), dict[str, torch.Tensor]()
    one.args, one.kwargs = (output,), {"rotary": {"main": torch.ones(3)}, "shared_kv_states": shared}
    handover = Handover([one])

    def is_hidden_states(output: object) -> bool:
        return handover.is_hidden_states([one], [(0, 1)], [output])

    assert is_hidden_states(output)
    assert not is_hidden_states((output, torch.ones(1)))
    assert not is_hidden_states(output.clone())  # the model's own code did something in between
    shared["full_attention"] = torch.ones(1)
    assert not is_hidden_states(output)


def test_a_bookmark_of_another_key_or_other_samples_is_ignored(tmp_path: Path) -> None:
    hidden = {(1,): torch.ones(1, 3, 2), (0, 2): torch.stack([torch.zeros(5, 2), torch.full((5, 2), 2.0)])}
    Bookmark(tmp_path, "key", "tokens").set(["a"], Ranges(inputs={"m": 1.0}), hidden)
    assert not Bookmark(tmp_path, "key", "others").find().layers
    assert not Bookmark(tmp_path, "other", "tokens").find().layers
    found = Bookmark(tmp_path, "key", "tokens").find()
    assert found.layers == ("a",)
    assert found.ranges.inputs == {"m": 1.0}
    assert [found.hidden[index].mean().item() for index in range(3)] == [0, 1, 2]


def test_a_bookmark_that_cannot_be_read_or_written_costs_no_more_than_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hidden = {(0,): torch.ones(1, 3, 2)}
    Bookmark(tmp_path / "a", "key", "tokens").set(["a"], Ranges(), hidden)
    (file,) = (tmp_path / "a").glob("hidden-*")
    file.write_bytes(b"")  # as after a power failure
    assert not Bookmark(tmp_path / "a", "key", "tokens").find().layers
    assert "starts again from the first layer" in caplog.text
    (tmp_path / "b").write_text("a file in the way fails like a full disk")
    bookmark = Bookmark(tmp_path / "b", "key", "tokens")
    bookmark.set(["a"], Ranges(), hidden)
    bookmark.set(["a", "b"], Ranges(), hidden)
    assert caplog.text.count("would have to repeat finished layers") == 1
