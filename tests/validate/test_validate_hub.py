"""The validator on repositories of a Hub: headers by ranges, nothing downloaded; more when asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import reference_checkpoints as reference
from support.malformed import O_PROJ, alter, drop, shards_of

from fp8pipe.hub.client import client
from fp8pipe.hub.source import resolve
from fp8pipe.rehearsal.localhub import LocalHub
from fp8pipe.stages import validate_model

pytestmark = pytest.mark.usefixtures("architecture_cache")


def push(repo_id: str, folder: Path) -> str:
    client().create_repo(repo_id)
    client().upload_folder(repo_id=repo_id, folder_path=folder)
    return repo_id


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model and its FP8 twin."""
    source = reference.llama(tmp_path / "source")
    return source, reference.quantize(source, tmp_path / "fp8", strategy="channel", static=False)


def test_headers_of_a_repository_are_judged_without_a_download(
    hub: LocalHub, repo_id: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    source, folder = folders
    drop(folder, f"{O_PROJ}.weight_scale")
    push(repo_id, folder)
    push(f"{repo_id}-source", source)
    for report in (
        validate_model(repo_id, oracles=False),
        validate_model(f"{repo_id}@main", source=f"{repo_id}-source", oracles=False),
        validate_model(repo_id, source=str(source), depth="headers", oracles=False),
    ):
        assert [finding.check for finding in report.findings] == ["K2"]
        assert (report.depth, report.bytes_read) == ("headers", 0)
    assert report.folder_identity == resolve(repo_id).commit
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_deeper_validation_downloads_and_finds_what_headers_cannot_tell(
    hub: LocalHub, repo_id: str, folders: tuple[Path, Path]
) -> None:
    source, folder = folders
    alter(folder, f"{O_PROJ}.weight", lambda codes: codes.flip(0))
    push(repo_id, folder)
    assert validate_model(repo_id).sound
    assert validate_model(repo_id, depth="values").depth == "values"
    report = validate_model(repo_id, source=str(source), depth="fidelity")
    assert {finding.check for finding in report.errors} == {"D1", "D2", "D3"}


def test_incomplete_repository_is_not_downloaded(
    hub: LocalHub, repo_id: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    _, folder = folders
    shards_of(folder)[0].unlink()
    report = validate_model(push(repo_id, folder), depth="values")
    assert (report.depth, [finding.check for finding in report.errors]) == ("headers", ["F2"])
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_files_beside_the_weights_are_compared_by_the_hub_s_hashes(
    hub: LocalHub, repo_id: str, folders: tuple[Path, Path]
) -> None:
    source, folder = folders
    (folder / "tokenizer.json").write_text((source / "tokenizer.json").read_text().replace("a", "b"))
    push(repo_id, folder)
    push(f"{repo_id}-source", source)
    report = validate_model(repo_id, source=f"{repo_id}-source")
    assert [(finding.check, finding.file) for finding in report.findings] == [("P1", "tokenizer.json")]
