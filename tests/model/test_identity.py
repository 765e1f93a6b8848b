"""The identity of a checkpoint is its content; the state of a source is cheap; hashes are taken once, and not believed
once a file could have changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from support.processes import peak_memory_mb

from fp8pipe.errors import SourceChanged
from fp8pipe.model import identity
from fp8pipe.model.identity import content_hashes, folder_identity, folder_state, identity_of

SHARD = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of three files, with records, a card, and traces of the machine that made it."""
    made = tmp_path / "checkpoint"
    (made / "fp8pipe").mkdir(parents=True)
    for name in ("config.json", "LICENSE", SHARD, "README.md", "fp8pipe/checkpoint.json", "run.log", ".hidden"):
        (made / name).write_text(f"content of {name}")
    return made


@pytest.mark.parametrize("take", ["folder_identity", "folder_state"])
def test_identity_of_a_huge_config_is_taken_in_pieces(tmp_path: Path, take: str) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1_000_000_000)
    code = f"import sys\nfrom pathlib import Path\nfrom fp8pipe.model.identity import {take}\n"
    assert peak_memory_mb(f"{code}{take}(Path(sys.argv[1]))", str(tmp_path)) - peak_memory_mb(code) < 100


def test_state_is_the_digest_of_names_lengths_and_contents(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "merges.txt").write_bytes(b"x" * 3_000_000)
    stream = b"config.json\0" + b"2\0{}" + b"merges.txt\0" + b"3000000\0" + b"x" * 3_000_000
    assert folder_state(tmp_path) == hashlib.sha256(stream).hexdigest()


def test_identity_is_the_content_of_what_is_published_but_records_and_card(folder: Path) -> None:
    before = folder_identity(folder)
    assert [file.name for file in content_hashes(folder)] == ["LICENSE", "config.json", SHARD]
    for name in ("README.md", "fp8pipe/checkpoint.json", "run.log", ".hidden"):
        (folder / name).write_text("other")
    assert folder_identity(folder) == before
    for name in ("LICENSE", "config.json", SHARD):
        (folder / name).write_text(f"content of {name}.")
        assert folder_identity(folder) != before
        (folder / name).write_text(f"content of {name}")
        assert folder_identity(folder) == before
    (folder / "LICENSE").rename(folder / "LICENCE")
    assert folder_identity(folder) != before


def test_a_copy_with_other_times_has_the_same_identity(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copyfile)
    os.utime(copied / SHARD, (0, 0))
    assert folder_identity(copied) == folder_identity(folder)


def test_a_file_whose_name_no_text_can_hold_has_a_hash(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/odd\xff")).write_bytes(b"x")
    (odd,) = [file for file in content_hashes(folder) if file.name.startswith("odd")]
    assert odd.sha256 == hashlib.sha256(b"x").hexdigest() and odd.model_dump_json()


# ---------------------------------------------------------------------------------------------- hashes taken before


@pytest.fixture
def known(folder: Path) -> Path:
    """The folder's file of remembered hashes, of which that of the shard is another one."""
    until = max((folder / file.name).stat().st_ctime_ns for file in content_hashes(folder)) + identity._FRESH_NS
    while time.time_ns() <= until:  # a file that has just changed is not remembered
        time.sleep(0.01)
    content_hashes(folder)
    path = folder / "fp8pipe" / ".hashes.json"
    content = json.loads(path.read_bytes())
    content[SHARD][1] = "remembered"
    path.write_text(json.dumps(content))
    return path


def sha256_of_shard(folder: Path) -> str:
    return next(file.sha256 for file in content_hashes(folder) if file.name == SHARD)


def test_a_file_that_did_not_change_is_not_read_again(folder: Path, known: Path) -> None:
    assert sha256_of_shard(folder) == "remembered"


def test_a_file_that_could_have_changed_is_read_again_whatever_its_times_say(folder: Path, known: Path) -> None:
    shard, stat = folder / SHARD, (folder / SHARD).stat()
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sha256_of_shard(folder) == hashlib.sha256(shard.read_bytes()).hexdigest()


def test_hashes_that_came_with_a_copy_are_not_believed(folder: Path, known: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    assert sha256_of_shard(copied) == hashlib.sha256((folder / SHARD).read_bytes()).hexdigest()


@pytest.mark.parametrize("content", ["{", "[]", '{"model.safetensors": 1, "config.json": [[1], 2]}'])
def test_a_broken_file_of_hashes_is_as_good_as_none(folder: Path, known: Path, content: str) -> None:
    known.write_text(content)
    assert sha256_of_shard(folder) == hashlib.sha256((folder / SHARD).read_bytes()).hexdigest()


def test_nothing_is_written_into_a_folder_that_is_no_checkpoint_of_ours(folder: Path, known: Path) -> None:
    known.unlink()
    (folder / "fp8pipe" / "checkpoint.json").unlink()
    content_hashes(folder)
    assert not known.exists()


def test_a_file_that_changed_a_moment_ago_is_not_remembered(folder: Path) -> None:
    (folder / SHARD).write_text("new")
    content_hashes(folder)
    path = folder / "fp8pipe" / ".hashes.json"
    assert not path.exists() or SHARD not in json.loads(path.read_bytes())


def test_a_file_that_changes_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest_and_edit(file, name):  # type: ignore[no-untyped-def]
        Path(file.name).write_text("edited meanwhile")
        return hashlib.new(name)

    monkeypatch.setattr(identity.hashlib, "file_digest", digest_and_edit)
    with pytest.raises(SourceChanged, match="changed while it was read"):
        folder_identity(folder)


def test_the_hub_lists_the_same_identity(folder: Path) -> None:
    assert identity_of(reversed(content_hashes(folder))) == folder_identity(folder)
