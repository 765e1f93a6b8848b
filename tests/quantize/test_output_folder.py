"""The output folder: what a loader needs and nothing else, one writer at a time, and no file of anybody else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.quantizing import Models, bytes_of, journalled, make
from support.tiny_models import calibration_for, plan_of, recipe
from support.writers import Writers

from fp8pipe.errors import EnvironmentFault, InputError
from fp8pipe.hub.source import resolve
from fp8pipe.progress import ProgressEvent
from fp8pipe.quantize import quantize


def test_the_folder_holds_what_a_loader_needs_and_nothing_else(model_folder: Models, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model_folder("llama"), source)
    companions = {
        "tokenizer.json": b'{"version":  "1.0"}\r\n',
        "chat_template.jinja": b"{{ x }}",
        "LICENSE": b"free",
        "spiece.model": bytes(range(256)),
    }
    left_behind = ("README.md", "modeling_x.py", "pytorch_model.bin", "params.json", ".secret", "training_args.bin")
    for name, content in companions.items():
        (source / name).write_bytes(content)
    for name in left_behind:
        (source / name).write_bytes(b"{}")
    _, checkpoint = make(source, recipe(), out)
    for name, content in companions.items():
        assert (out / name).read_bytes() == content
    assert not any((out / name).exists() for name in left_behind)
    assert {path.name for path in (out / "fp8pipe").iterdir()} == {"plan.json", "source_config.json", "checkpoint.json"}
    assert (out / "fp8pipe" / "source_config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not list(out.glob(".*"))
    assert checkpoint.output_bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))


def test_config_json_gains_quantization_config_and_changes_nothing_else(model_folder: Models, tmp_path: Path) -> None:
    plan, _ = make(model_folder("llama"), recipe(), tmp_path)
    before = json.loads((model_folder("llama") / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    assert after.pop("quantization_config") == plan.quantization_config
    assert list(after.items()) == list(before.items())


def test_progress_ends_with_all_bytes_and_tensors(model_folder: Models, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    plan, _ = make(model_folder("llama"), recipe(), tmp_path, progress=events.append)
    last = events[-1]
    assert (last.stage, last.unit) == ("quantize", "B")
    assert last.done == last.total == sum(tensor.end - tensor.begin for tensor in plan.tensors)
    assert last.note == f"{len(plan.tensors)}/{len(plan.tensors)} tensors"


def test_a_finished_folder_is_returned_untouched(model_folder: Models, tmp_path: Path) -> None:
    plan, first = make(model_folder("llama"), recipe(), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert quantize(resolve(str(model_folder("llama"))), plan, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_a_folder_with_another_model_is_not_overwritten(model_folder: Models, tmp_path: Path) -> None:
    make(model_folder("llama"), recipe(), tmp_path)
    before = bytes_of(tmp_path)
    with pytest.raises(InputError, match="another model or recipe"):
        make(model_folder("llama"), recipe("fp8-block"), tmp_path)
    assert bytes_of(tmp_path) == before
    with pytest.raises(InputError, match="same folder"):
        make(model_folder("llama"), recipe(), model_folder("llama"))


def test_a_second_writer_is_refused(model_folder: Models, tmp_path: Path) -> None:
    source = model_folder("llama")
    plan, snapshot = plan_of(source, recipe()), resolve(str(source))
    refused: list[str] = []

    def listen(event: ProgressEvent) -> None:
        with pytest.raises(InputError, match="another run") as caught:
            quantize(snapshot, plan, tmp_path)
        refused.append(str(caught.value))

    quantize(snapshot, plan, tmp_path, progress=listen)
    assert refused


# ---------------------------------------------------------------------------------------------- another run's work


def stop(event: ProgressEvent) -> None:
    """A listener that fails, and the run with it."""
    raise RuntimeError("stop")


def test_unfinished_work_of_another_recipe_is_replaced(model_folder: Models, tmp_path: Path) -> None:
    source, out = model_folder("llama"), tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop"):
        make(source, recipe("fp8-block"), out, progress=stop)
    make(source, recipe(), out)
    make(source, recipe(), tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


KILLS = {
    "before the first file is removed": ("os.remove", 0, ""),
    "when one file is removed": ("os.remove", 1, ""),
    "when three files are removed": ("os.remove", 3, ""),
    "when all are removed, before the new journal": ("os.rename", 1, "quantize.journal"),
}


@pytest.mark.parametrize("next_recipe", ["fp8-dynamic", "fp8-block"])
@pytest.mark.parametrize("moment", KILLS)
def test_killed_while_another_recipes_work_is_replaced_either_recipe_can_be_run(
    model_folder: Models, tmp_path: Path, writers: Writers, moment: str, next_recipe: str
) -> None:
    source, out = model_folder("llama"), tmp_path / "out"
    snapshot, some = resolve(str(source)), sorted(source.glob("*.safetensors"))[:-1]
    with pytest.raises(EnvironmentFault, match="did not arrive"):
        quantize(snapshot, plan_of(source, recipe("fp8-block")), out, arriving=some)
    assert list(out.glob("*.safetensors")) and journalled(out)
    event, number, name = KILLS[moment]
    writers.give(tmp_path, snapshot, plan_of(source, recipe()))
    assert writers.run_killed_before(event, number=number, name=name) == -9
    make(source, recipe(next_recipe), out)
    make(source, recipe(next_recipe), tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


def test_unfinished_work_of_another_model_leaves_none_of_its_files(
    model_folder: Models, tmp_path: Path, writers: Writers
) -> None:
    theirs, ours, out = tmp_path / "theirs", tmp_path / "ours", tmp_path / "out"
    shutil.copytree(model_folder("llama"), theirs)
    shutil.copytree(model_folder("llama", shard_size="1GB"), ours)
    (theirs / "merges.txt").write_text("theirs")
    plan = plan_of(theirs, recipe("fp8-static"))
    writers.give(tmp_path, resolve(str(theirs)), plan, calibration_for(plan))
    assert writers.run_killed_before("os.rename", name="/config.json") == -9
    assert (out / "merges.txt").exists() and (out / "model.safetensors.index.json").exists()
    (out / "own notes.txt").write_text("of the user")
    make(ours, recipe(), out)
    make(ours, recipe(), tmp_path / "clean")
    assert bytes_of(out).keys() - bytes_of(tmp_path / "clean").keys() == {"own notes.txt"}


def test_a_journal_that_names_files_outside_the_folder_removes_nothing(model_folder: Models, tmp_path: Path) -> None:
    (tmp_path / "out" / "fp8pipe").mkdir(parents=True)
    (tmp_path / "precious").write_text("of the user")
    names = ["../precious", str(tmp_path / "precious"), 3]
    journal = tmp_path / "out" / "fp8pipe" / "quantize.journal"
    journal.write_text(json.dumps({"identity": "x", "files": names}) + "\n")
    make(model_folder("llama"), recipe(), tmp_path / "out")
    assert (tmp_path / "precious").exists()
