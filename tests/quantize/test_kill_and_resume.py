"""Killed at any moment and run again, the folder ends with the bytes of an undisturbed run, and no work is repeated."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from support.quantizing import SCHEMES, Models, bytes_of, journalled, make
from support.tiny_models import architecture_of, calibration_for, make_model, plan_of, recipe
from support.writers import Writers

from fp8pipe.config import Recipe
from fp8pipe.errors import EnvironmentFault
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.architecture import TensorRole
from fp8pipe.quantize import fingerprint, quantize
from fp8pipe.quantize.plan import make_plan


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that a kill falls inside the work."""
    return make_model(
        tmp_path_factory.mktemp("big"), hidden_size=512, intermediate_size=2048, num_hidden_layers=6, shard_size="8MB"
    )


def kill_at_random(writers: Writers, tmp_path: Path, source: Path, wanted: Recipe, kills: int, seed: int) -> None:
    """Kill runs at random moments, let the last one finish, and compare it with an undisturbed run."""
    plan, undisturbed = make(source, wanted, tmp_path / "undisturbed")
    duration = max(undisturbed.seconds, 0.05)
    dice = random.Random(seed)
    done: set[str] = set()
    out = tmp_path / "out"
    writers.give(tmp_path, resolve(str(source)), plan, calibration_for(plan) if wanted.needs_calibration else None)
    for _ in range(kills):
        code = writers.run_killed_after(dice.uniform(0, duration))
        assert code in {0, -signal.SIGKILL}
        before, done = done, journalled(out)
        if code == 0 or (out / "fp8pipe" / "checkpoint.json").exists():
            shutil.rmtree(out)  # it was faster than the kill: start over
            done = set()
            continue
        assert before <= done
        assert not (out / "config.json").exists() or len(done) == len(plan.tensors)
    assert writers.run() == 0
    assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("scheme", ["channel", "tensor mse"])
def test_killed_at_random_moments_the_folder_ends_byte_equal(
    writers: Writers, many_shards: Path, tmp_path: Path, scheme: str
) -> None:
    kill_at_random(writers, tmp_path, many_shards, recipe(**SCHEMES[scheme]), kills=3, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["channel", "tensor", "block", "channel mse", "tensor mse", "block mse", "static"])
def test_killed_thirty_times_the_folder_ends_byte_equal(
    writers: Writers, many_shards: Path, tmp_path: Path, scheme: str
) -> None:
    wanted = recipe("fp8-static-kv") if scheme == "static" else recipe(**SCHEMES[scheme])
    kill_at_random(writers, tmp_path, many_shards, wanted, kills=30, seed=2)


def test_a_rerun_reads_no_finished_tensor_again(model_folder: Models, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model_folder("llama"), source)
    plan, snapshot = plan_of(source, recipe()), resolve(str(source))
    quantize(snapshot, plan, tmp_path / "clean")
    with pytest.raises(EnvironmentFault):
        quantize(snapshot, plan, out, arriving=sorted(source.glob("*.safetensors"))[:-1])
    finished = [tensor for tensor in plan.tensors if tensor.name in journalled(out) and tensor.action == "quantize"]
    assert finished
    for tensor in finished:  # a NaN in each, with the file's time as it was: reading one again would be an error
        path = source / tensor.shard
        stat = path.stat()
        with path.open("r+b") as file:
            file.seek(tensor.begin)
            file.write(b"\xc0\x7f")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    quantize(snapshot, plan, out)
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


def test_temporary_files_that_a_kill_leaves_are_removed(model_folder: Models, tmp_path: Path) -> None:
    source, out = model_folder("llama"), tmp_path / "out"
    plan = plan_of(source, recipe())
    with pytest.raises(EnvironmentFault):
        quantize(resolve(str(source)), plan, out, arriving=())
    for name in (".config.json.abc", ".generation_config.json.abc", "fp8pipe/.quantize.journal.abc"):
        (out / name).write_bytes(b"half")
    quantize(resolve(str(source)), plan, out)
    make(source, recipe(), tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


def test_a_journal_of_another_boot_counts_only_for_renamed_shards(model_folder: Models, tmp_path: Path) -> None:
    source, out = model_folder("llama"), tmp_path / "out"
    plan = plan_of(source, recipe())
    some = sorted(source.glob("*.safetensors"))[:-1]
    with pytest.raises(EnvironmentFault):
        quantize(resolve(str(source)), plan, out, arriving=some)
    journal = out / "fp8pipe" / "quantize.journal"
    head, *lines = journal.read_text().splitlines()
    journal.write_text("\n".join([json.dumps(json.loads(head) | {"boot": "another"}), *lines, '{"weight": "torn']))
    for partial in out.glob(".*.partial"):  # what the machine lost
        partial.write_bytes(bytes(partial.stat().st_size))
    quantize(resolve(str(source)), plan, out)
    make(source, recipe(), tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


def test_another_plan_of_the_same_recipe_and_commit_does_not_resume_the_first(
    model_folder: Models, tmp_path: Path
) -> None:
    """As after an upgrade of transformers between a kill and the next run."""
    source, out = model_folder("llama"), tmp_path / "out"
    snapshot, some = resolve(str(source)), sorted(source.glob("*.safetensors"))[:-1]
    first, architecture = plan_of(source, recipe()), architecture_of(source)
    with pytest.raises(EnvironmentFault, match="did not arrive"):
        quantize(snapshot, first, out, arriving=some)
    flipped = next(name for name in sorted(journalled(out)) if name.endswith("down_proj.weight"))
    roles = architecture.tensors | {flipped: TensorRole(kind="parameter", reason="flipped")}
    changed = architecture.model_copy(update={"tensors": roles})
    second = make_plan(snapshot, read_headers(snapshot), recipe(), changed)
    assert first.work_digest() != second.work_digest()
    made = quantize(snapshot, second, out)
    clean = quantize(snapshot, second, tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")
    assert made.fingerprint == clean.fingerprint == fingerprint(snapshot, recipe(), None)
