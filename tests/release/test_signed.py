"""A signed release: who published it can be proven, and signing again changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.keys import key_pair
from support.releases import commits, release
from support.sample_folders import STRICTER, gate_again, write_checkpoint

from fp8pipe.config import Sign
from fp8pipe.errors import InputError
from fp8pipe.hub.client import client
from fp8pipe.records import Proof
from fp8pipe.rehearsal.localhub import LocalHub
from fp8pipe.release.verify import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be published."""
    return write_checkpoint(tmp_path / "checkpoint")


def signature_of(target: str, key: Path | None) -> Proof:
    return next(proof for proof in verify(target, key=key).proofs if proof.part == "signature")


def test_a_signed_release_is_proven_by_the_key_and_by_no_other(
    hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path
) -> None:
    (private, public), (_, other) = (key_pair(tmp_path / name) for name in ("ours", "theirs"))
    made = release(folder, repo_id, sign=Sign(key=str(private)))
    assert "model.sig" in {file.name for file in made.files}
    for target in (repo_id, f"{repo_id}@{made.tag}", str(folder)):
        assert signature_of(target, public).outcome == "proven"
        assert signature_of(target, other).outcome == "broken"
        assert signature_of(target, None).outcome == "open"
    client().upload_file(repo_id=repo_id, path_in_repo="tokenizer.json", path_or_fileobj=b"[]")
    for key in (public, None):
        assert "signs other content: tokenizer.json" in signature_of(repo_id, key).found[0]


def test_a_release_without_a_signature_is_broken_to_who_expects_one(
    hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path
) -> None:
    release(folder, repo_id)
    assert signature_of(repo_id, None).outcome == "open"
    assert signature_of(repo_id, key_pair(tmp_path / "keys")[1]).outcome == "broken"


def test_publishing_a_signed_release_again_makes_no_commit_wherever_it_is_done(
    hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path
) -> None:
    private, public = key_pair(tmp_path / "keys")
    first = release(folder, repo_id, sign=Sign(key=str(private)))
    (folder / "model.sig").unlink()
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    for place in (folder, elsewhere):
        for again in (release(place, repo_id, sign=Sign(key=str(private))), release(place, repo_id)):
            assert (again.commit, again.tag, again.files, again.new_commit) == (
                *(first.commit, first.tag, first.files),
                False,
            )
    assert commits(repo_id) == 1 and signature_of(repo_id, public).outcome == "proven"


def test_a_new_release_is_signed_anew_and_another_key_makes_a_new_release(
    hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path
) -> None:
    (private, public), (other, others) = (key_pair(tmp_path / name) for name in ("ours", "theirs"))
    first = release(folder, repo_id, sign=Sign(key=str(private)))
    gate_again(folder, STRICTER)
    second = release(folder, repo_id, sign=Sign(key=str(private)))
    third = release(folder, repo_id, sign=Sign(key=str(other)))
    for made, key in ((first, public), (second, public), (third, others)):
        assert signature_of(f"{repo_id}@{made.tag}", key).outcome == "proven"
    gate_again(folder)
    unsigned = release(folder, repo_id)
    assert "model.sig" not in {file.name for file in unsigned.files}


def test_a_key_that_cannot_sign_is_refused_before_anything_is_uploaded(
    hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="expected an EC private key"):
        release(folder, repo_id, sign=Sign(key=str(tmp_path / "gone.pem")))
    assert not client().repo_exists(repo_id)
