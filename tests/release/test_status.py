"""status: what the records of a work folder say, and what the Hub adds to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support.collections import collection_of
from support.releases import release
from support.reports import SOURCE_COMMIT
from support.sample_folders import CHECKPOINT, gate_again, write_checkpoint, write_model
from typer.testing import CliRunner

from fp8pipe.cli import app
from fp8pipe.config import CollectionSpec
from fp8pipe.files import write_atomically
from fp8pipe.hub.client import client
from fp8pipe.hub.source import resolve
from fp8pipe.records import Checkpoint, Outcome, Release
from fp8pipe.records.paths import record_path
from fp8pipe.rehearsal.localhub import LocalHub
from fp8pipe.release.status import collection_status, release_status
from fp8pipe.release.workspace import Workspace
from fp8pipe.release.yank import yank


@pytest.fixture
def source(hub: LocalHub, repo_id: str, tmp_path: Path) -> str:
    """A source model on the Hub."""
    source = f"{repo_id}-source"
    client().create_repo(source)
    client().upload_folder(repo_id=source, folder_path=write_model(tmp_path / "source"))
    return source


@pytest.fixture
def made(source: str, repo_id: str, tmp_path: Path) -> Release:
    """A published release of its present commit."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    about = {"model_id": source, "source_commit": resolve(source).commit}
    path = record_path(folder, "checkpoint")
    Checkpoint.load(path).model_copy(update=about).save(path)
    gate_again(folder)
    return release(folder, repo_id)


@pytest.fixture
def spec(source: str, repo_id: str, tmp_path: Path) -> CollectionSpec:
    """The file with that one release."""
    return collection_of(repo_id, title="any", model=source, work_dir=str(tmp_path / "work"))


def state(spec: CollectionSpec) -> tuple[str, str]:
    (row,) = collection_status(spec)
    return row.state, row.detail


def rejected(work: Path, source: str, commit: str, recipe: str = "fp8-static-kv") -> None:
    """The record of a release that the gate rejected."""
    outcome = Outcome(
        verdict="rejected",
        reason="gsm8k lost 9 points",
        model_id=source,
        source_commit=commit,
        recipe=recipe,
        suite="quick",
        policy="quick",
        fingerprint="cd34" * 16,
        source_bytes=2,
        output_bytes=1,
        decision=None,
        release=None,
    )
    outcome.save(Workspace(work).release(source, recipe, outcome.fingerprint).outcome)


def test_on_the_hub_a_release_is_missing_published_stale_and_yanked_in_turn(
    spec: CollectionSpec, source: str, made: Release, repo_id: str, tmp_path: Path
) -> None:
    assert state(spec) == ("published", f"{repo_id}@{made.tag}")
    nowhere = collection_of(f"{repo_id}-2", title="any", model=source, work_dir=str(tmp_path / "work"))
    assert state(nowhere) == ("missing", "")

    client().upload_file(repo_id=source, path_in_repo="config.json", path_or_fileobj=b'{"model_type": "llama", "a": 1}')
    new = resolve(source).commit
    assert state(spec)[0] == "stale" and new[:12] in state(spec)[1] and made.source_commit[:12] in state(spec)[1]
    rejected(tmp_path / "work", source, made.source_commit)
    assert state(spec)[0] == "stale", "that was the commit before"
    rejected(tmp_path / "work", source, new)
    assert state(spec) == (
        "rejected",
        f"gsm8k lost 9 points; {repo_id}@{made.tag} is of {made.source_commit[:12]}",
    )
    yank(repo_id, "the tokenizer was wrong")
    assert state(spec)[0] == "yanked" and "the tokenizer was wrong" in state(spec)[1]


def test_a_pinned_source_is_not_stale_when_its_branch_moves(
    spec: CollectionSpec, source: str, made: Release, repo_id: str
) -> None:
    client().upload_file(repo_id=source, path_in_repo="config.json", path_or_fileobj=b'{"model_type": "llama", "a": 1}')
    pinned = collection_of(repo_id, title="any", model=f"{source}@{made.source_commit}")
    assert state(spec)[0] == "stale" and state(pinned)[0] == "published"


def test_a_source_that_is_gone_is_said_beside_the_release(spec: CollectionSpec, source: str, made: Release) -> None:
    client().delete_repo(source)
    found, detail = state(spec)
    assert found == "published" and "cannot be compared" in detail and source in detail


def test_offline_no_request_is_made_and_every_entry_has_a_row(
    spec: CollectionSpec, source: str, repo_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    work = Path(spec.work_dir)
    assert [row.state for row in release_status(work, spec)] == ["missing"]
    rejected(work, source, SOURCE_COMMIT)
    rejected(work, "acme/another", SOURCE_COMMIT)
    checkpoint = CHECKPOINT.model_copy(update={"model_id": source})
    folder = Workspace(work).release(source, "fp8-static-kv", checkpoint.fingerprint)
    checkpoint.save(record_path(folder.checkpoint, "checkpoint"))
    assert sorted(row.state for row in release_status(work, spec)) == ["quantized", "rejected"]
    assert {row.model for row in release_status(work)} == {source, "acme/another"}


def test_the_command_asks_the_hub_only_with_hub_and_for_a_file(
    spec: CollectionSpec, made: Release, repo_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "collection.yaml"
    write_atomically(file, yaml.safe_dump(spec.model_dump(mode="json")).encode())
    offline = CliRunner().invoke(app, ["status", str(file), "--json"])
    assert [row["state"] for row in json.loads(offline.stdout)["releases"]] == ["missing"]
    monkeypatch.setenv("COLUMNS", "80")
    asked = CliRunner().invoke(app, ["status", str(file), "--hub"])
    assert asked.exit_code == 0 and "1 published" in asked.output and made.tag in asked.output, asked.output
    assert max(len(line.rstrip()) for line in asked.output.splitlines()) <= 80
    nothing = CliRunner().invoke(app, ["status", "--hub"])
    assert nothing.exit_code == 2 and "collection file" in nothing.output
