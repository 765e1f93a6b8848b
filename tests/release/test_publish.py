"""publish: what it leaves on the Hub, what it leaves alone, and what it refuses before it asks the Hub for anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from support.releases import commits, items, release, tags
from support.reports import policy
from support.sample_folders import (
    CHECKPOINT,
    FINGERPRINT,
    STRICTER,
    approve_as_is,
    gate_again,
    validation,
    write_checkpoint,
)

from fp8pipe.errors import InputError, Refused
from fp8pipe.hub.client import client
from fp8pipe.hub.download import download
from fp8pipe.hub.source import resolve
from fp8pipe.progress import ProgressEvent
from fp8pipe.records import Manifest
from fp8pipe.rehearsal.localhub import LocalHub

TAG = f"fp8-{FINGERPRINT[:8]}-1"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be published."""
    return write_checkpoint(tmp_path / "checkpoint")


# ---------------------------------------------------------------------------------------------- the release


def test_a_release_is_public_tagged_listed_and_byte_for_byte_the_folder(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    made = release(folder, repo_id)

    info = client().model_info(repo_id)
    assert not info.private and info.sha == made.commit and made.new_commit
    assert commits(repo_id) == 1
    assert tags(repo_id) == {TAG: made.commit}
    assert items(made) == [(repo_id, "-0.1 points")]
    assert made.repo_url == f"{hub.endpoint}/{repo_id}"

    fetched = download(resolve(f"{repo_id}@{TAG}"))
    for file in fetched.files:
        assert (fetched.path / file.name).read_bytes() == (folder / file.name).read_bytes(), file.name
    held = {file.rfilename for file in client().model_info(repo_id).siblings or ()}
    assert {"fp8pipe/checkpoint.json", "fp8pipe/gate.json", "fp8pipe/validation.json", "README.md"} < held
    assert held == {file.name for file in made.files} | {".gitattributes"}


def test_a_release_is_invisible_to_others_until_it_is_verified_and_tagged(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    visible: dict[str, bool] = {}

    def look(event: ProgressEvent) -> None:
        if event.note in {"commit", "verify", "tag", "make public", "collection"}:
            visible[event.note] = HfApi(endpoint=hub.endpoint, token=False).repo_exists(repo_id)

    release(folder, repo_id, progress=look)
    assert visible == {"commit": False, "verify": False, "tag": False, "make public": False, "collection": True}


def test_republishing_the_same_bytes_makes_no_commit_and_the_same_record(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    first = release(folder, repo_id)
    second = release(folder, repo_id)
    assert commits(repo_id) == 1
    assert second == first.model_copy(update={"new_commit": False})
    assert items(second) == [(repo_id, "-0.1 points")]


def test_hidden_unfinished_and_local_files_are_not_uploaded(hub: LocalHub, repo_id: str, folder: Path) -> None:
    for name in (
        ".resume.json",
        "model.tmp",
        "fp8pipe/release.json",
        "fp8pipe/quantize.journal",
        "fp8pipe/.state/tile",
        "run.log",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("local")
    names = {file.name for file in release(folder, repo_id).files}
    assert not [
        name for name in names if name.endswith((".tmp", ".log", ".journal", "release.json")) or "/." in f"/{name}"
    ]


def test_a_release_of_another_checkpoint_replaces_and_deletes_under_the_next_tag(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    first = release(folder, repo_id)
    (folder / "LICENSE").unlink()
    (folder / "NOTICE").write_text("new")
    validation(folder).save(folder / "fp8pipe" / "validation.json")
    other = "cd34" * 16
    CHECKPOINT.model_copy(update={"fingerprint": other}).save(folder / "fp8pipe" / "checkpoint.json")
    gate_again(folder)
    second = release(folder, repo_id)
    assert second.tag == "fp8-cd34cd34-2"
    held = {file.rfilename for file in client().model_info(repo_id, revision=second.tag).siblings or ()}
    assert "NOTICE" in held and "LICENSE" not in held and commits(repo_id) == 2
    assert tags(repo_id) == {TAG: first.commit, second.tag: second.commit}


# ---------------------------------------------------------------------------------------------- released again


def test_the_same_checkpoint_with_other_evidence_is_the_next_release_and_sends_no_weights_again(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    first = release(folder, repo_id)
    sent = hub.log.read_text().count('"PUT /_lfs/')
    gate_again(folder, STRICTER)
    second = release(folder, repo_id)
    third = release(folder, repo_id, words="another template")
    assert [first.tag, second.tag, third.tag] == [f"fp8-ab12ab12-{number}" for number in (1, 2, 3)]
    assert tags(repo_id) == {made.tag: made.commit for made in (first, second, third)}
    assert commits(repo_id) == 3 and second.new_commit and third.new_commit
    assert hub.log.read_text().count('"PUT /_lfs/') == sent
    again = release(folder, repo_id, words="another template")
    assert (again.tag, again.commit, again.new_commit) == (third.tag, third.commit, False)
    assert Manifest.load(folder / "fp8pipe" / "manifest.json").tag == third.tag
    assert download(resolve(f"{repo_id}@{first.tag}")).commit == first.commit, "a tag never moves"


def test_an_earlier_state_that_comes_back_is_a_release_of_its_own(hub: LocalHub, repo_id: str, folder: Path) -> None:
    for words in ("one", "two", "one"):
        release(folder, repo_id, words=words)
    assert sorted(tags(repo_id)) == [f"fp8-ab12ab12-{number}" for number in (1, 2, 3)]


def test_nothing_in_a_release_depends_on_the_folder_or_on_the_run(
    hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path
) -> None:
    first = release(folder, repo_id)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy2)
    (tmp_path / "copy" / "fp8pipe" / "manifest.json").unlink()
    again = release(tmp_path / "copy", repo_id)
    assert (again.commit, again.tag, again.files, again.new_commit) == (first.commit, first.tag, first.files, False)


def test_an_approved_release_says_so_in_its_record_and_carries_the_approval(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    approve_as_is(folder, gate_again(folder, policy(on_inconclusive="ask"), lost=10, won=5))
    made = release(folder, repo_id)
    assert made.verdict == "inconclusive"
    assert "fp8pipe/approval.json" in {file.name for file in made.files}


# ---------------------------------------------------------------------------------------------- the collection


def test_the_note_of_an_existing_item_is_brought_up_to_date(hub: LocalHub, repo_id: str, folder: Path) -> None:
    release(folder, repo_id, note="old")
    assert items(release(folder, repo_id, note="new")) == [(repo_id, "new")]


def test_a_collection_is_found_by_slug_address_or_title_and_not_made_twice(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    slug = client().create_collection(repo_id[-50:], namespace="acme").slug
    for name in (slug, f"{hub.endpoint}/collections/{slug}", f"acme/{repo_id[-50:]}"):
        made = release(folder, repo_id, collection=name, note=name)
        assert made.collection_slug == slug
        assert items(made) == [(repo_id, name)]


def test_a_new_collection_gets_the_description_and_an_existing_one_keeps_its_own(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    for description in ("FP8 models of ours", "other words"):
        made = release(folder, repo_id, collection=f"acme/new {repo_id[-50:]}", collection_description=description)
        assert made.collection_slug is not None
        assert client().get_collection(made.collection_slug).description == "FP8 models of ours"


# ---------------------------------------------------------------------------------------------- refusals


def test_what_may_not_be_published_leaves_no_trace_on_the_hub(hub: LocalHub, repo_id: str, folder: Path) -> None:
    gate_again(folder, lost=60)
    with pytest.raises(Refused, match=r"rejected it: .* drop 12\.00 points"):
        release(folder, repo_id)
    (folder / "fp8pipe" / "gate.json").unlink()
    with pytest.raises(Refused, match=r"gate\.json"):
        release(folder, repo_id)
    gate_again(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(Refused, match="changed since it was validated"):
        release(folder, repo_id)
    assert not client().repo_exists(repo_id)


def test_a_link_in_the_folder_is_refused_and_not_followed(
    hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "notes.md").symlink_to(tmp_path / "secret")
    with pytest.raises(Refused, match=r"notes\.md is a link"):
        release(folder, repo_id)
    assert not client().repo_exists(repo_id)


def test_a_note_too_long_for_the_hub_is_refused_before_anything_is_created(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    with pytest.raises(InputError, match="501 characters"):
        release(folder, repo_id, note="x" * 501)
    assert not client().repo_exists(repo_id)


def test_a_hash_that_was_forged_on_this_machine_does_not_reach_the_hub(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    validated = {file.name: file.sha256 for file in validation(folder).files}[SHARD]
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    stat = shard.stat()
    stamp = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    (folder / "fp8pipe" / ".hashes.json").write_text(json.dumps({SHARD: [stamp, validated]}))
    with pytest.raises(InputError, match="the bytes that arrived hash to"):
        release(folder, repo_id)
    assert tags(repo_id) == {} and client().model_info(repo_id).private
