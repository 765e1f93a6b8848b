"""Converting: which folders it writes to, kills and changed sources, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import reference_checkpoints as reference
from support.conversions import config_of, everything, to, weights_of
from support.quantizing import tensors_of
from typer.testing import CliRunner

from fp8pipe.cli import app
from fp8pipe.convert import convert, plan_conversion
from fp8pipe.convert import write as write_module
from fp8pipe.errors import InputError, SourceChanged
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.identity import folder_identity
from fp8pipe.progress import ProgressEvent


def test_the_output_must_be_a_new_folder_apart_from_the_source(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    before = everything(source)
    for folder in (source, source / "out", tmp_path):
        with pytest.raises(InputError, match="may not contain each other"):
            to("fp8", source, folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty \(it holds thesis\.txt\)"):
        to("fp8", source, tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        to("fp8", source, tmp_path / "file")
    assert everything(source) == before and (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_finished_folder_is_returned_untouched_and_not_given_to_another_conversion(
    llama: Path, tmp_path: Path
) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    other = reference.quantize(llama, tmp_path / "other", static=False)
    first = to("fp8", source, tmp_path / "out")
    identity = folder_identity(tmp_path / "out")
    assert to("fp8", source, tmp_path / "out") == first and folder_identity(tmp_path / "out") == identity
    with pytest.raises(InputError, match="not empty"):
        to("fp8", other, tmp_path / "out")


def test_tiles_change_no_byte_and_progress_ends_with_all_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    to("fp8", source, tmp_path / "whole")
    monkeypatch.setattr(write_module, "TILE", 1000)
    events: list[ProgressEvent] = []
    snapshot = resolve(str(source))
    conversion = plan_conversion(snapshot, read_headers(snapshot), to="fp8")
    convert(conversion, tmp_path / "tiles", progress=events.append)
    assert weights_of(tmp_path / "tiles") == weights_of(tmp_path / "whole")
    assert events[-1].done == events[-1].total == sum(t.nbytes for t in tensors_of(tmp_path / "whole").values())
    assert len(events) > events[-1].done / 1000


def test_a_source_that_changes_is_an_error_and_leaves_no_model(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    snapshot = resolve(str(source))
    conversion = plan_conversion(snapshot, read_headers(snapshot), to="fp8")
    shard = sorted(source.glob("*.safetensors"))[0]

    def touch(event: ProgressEvent) -> None:
        shard.write_bytes(shard.read_bytes())

    with pytest.raises(SourceChanged):
        convert(conversion, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out" / "config.json").exists() and not list((tmp_path / "out").glob("*.safetensors"))


KILLED = """
import os, signal, sys
from pathlib import Path
from fp8pipe.hub.headers import read_headers
from fp8pipe.convert import convert, plan_conversion
from fp8pipe.errors import Fp8PipeError
from fp8pipe.hub.source import resolve

source, out = Path(sys.argv[1]), Path(sys.argv[2])
snapshot = resolve(str(source))
conversion = plan_conversion(snapshot, read_headers(snapshot), to="fp8")

def killed_before_rename(number, folder):
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, arguments):
            nonlocal seen
            seen += event == "os.rename"
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        convert(conversion, folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0

kills = 0
while killed_before_rename(kills + 1, out / f"one {kills}"):
    folder = out / f"one {kills}"
    complete = len(list(folder.glob("*.safetensors"))) == len(conversion.shards())
    assert complete or not (folder / "config.json").exists(), "an unfinished folder looks like a model"
    killed_before_rename(1, folder)
    convert(conversion, folder)
    kills += 1
folder = out / "many"
for number in (1, 2, 2, 3, 3, 1, 2, 4):
    killed_before_rename(number, folder)
convert(conversion, folder)
print(kills)
"""


def test_killed_before_any_rename_and_run_again_the_folder_is_that_of_an_undisturbed_run(
    llama: Path, tmp_path: Path
) -> None:
    source = reference.quantize(llama, tmp_path / "source", shards=3, kv="tensor")
    to("fp8", source, tmp_path / "undisturbed")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 1 + 3 + 5 + 1 + 1 + 1  # journal, shards, companions, index, config.json, record
    expected = everything(tmp_path / "undisturbed")
    folders = sorted((tmp_path / "out").iterdir())
    assert len(folders) == 14
    assert all(everything(folder) == expected for folder in folders)


def test_unfinished_work_of_another_conversion_is_refused(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    (tmp_path / "out" / "fp8pipe").mkdir(parents=True)
    (tmp_path / "out" / "fp8pipe" / "convert.journal").write_text("of something else")
    with pytest.raises(InputError, match="another, unfinished conversion"):
        to("fp8", source, tmp_path / "out")


def test_the_command_names_its_folder_and_shows_what_changed(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "model")
    result = CliRunner().invoke(app, ["convert", str(source), "--to", "fp8"])
    assert result.exit_code == 0, result.output
    assert "input_scale [1] -> input_scale []" in result.output and "14" in result.output
    assert config_of(tmp_path / "model-fp8")["quant_method"] == "fp8"
    result = CliRunner().invoke(app, ["convert", str(source), "--to", "fp8", "-o", str(tmp_path / "x"), "--json"])
    assert json.loads(result.stdout)["folder"] == str(tmp_path / "x")


@pytest.mark.parametrize("arguments", [["--output", "x"], ["--to", "nvfp4"]])
def test_a_command_that_asks_for_nothing_exits_2(llama: Path, arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["convert", str(llama), *arguments]).exit_code == 2
