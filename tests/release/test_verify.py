"""verify: nothing is broken in a good release, and whatever was done to one is found, by name."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd
from support.processes import FP8PIPE
from support.provable import judge, provable
from support.releases import release_with_card

from fp8pipe.hub.client import cache_folder, client
from fp8pipe.hub.source import tags_of
from fp8pipe.model.identity import file_hashes, identity_of, published_files
from fp8pipe.records import Checkpoint, Manifest, Verification
from fp8pipe.records.paths import record_path
from fp8pipe.rehearsal.localhub import LocalHub
from fp8pipe.release.verify import verify

SHARD = "model-00001-of-00002.safetensors"
NOT_SIGNED = {"signature"}


@pytest.fixture(scope="module")
def checkpoint(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that may be published; tests copy it."""
    return provable(model_folder("llama"), tmp_path_factory.mktemp("provable") / "checkpoint")


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def released(checkpoint: Path, running_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was published, with its card and manifest; tests copy it."""
    made = shutil.copytree(checkpoint, tmp_path_factory.mktemp("released") / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running_hub.environment().items():
            patch.setenv(name, value)
        release_with_card(made, "acme/verified-folder")
    return made


@pytest.fixture
def copied(released: Path, tmp_path: Path) -> Path:
    """A copy of the published folder."""
    return shutil.copytree(released, tmp_path / "copied")


def broken(verification: Verification) -> dict[str, str]:
    """Each broken part, and what is wrong with it."""
    return {proof.part: "\n".join(proof.found) for proof in verification.proofs if proof.outcome == "broken"}


def unproven(verification: Verification) -> set[str]:
    return {proof.part for proof in verification.proofs if proof.outcome == "open"}


def largest(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def flip(path: Path) -> bytes:
    """The file's bytes with the last one changed."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    return bytes(data)


# ---------------------------------------------------------------------------------------------- a good release


def test_every_part_of_a_good_release_is_proven_from_the_hub_alone(hub: LocalHub, repo_id: str, folder: Path) -> None:
    made = release_with_card(folder, repo_id)
    shutil.rmtree(folder)
    for target in (repo_id, f"{repo_id}@{made.tag}"):
        found = verify(target)
        assert broken(found) == {} and unproven(found) == NOT_SIGNED and found.holds
        assert (found.model_id, found.commit, found.tag) == (repo_id, made.commit, made.tag)
    assert [proof.part for proof in found.proofs] == [
        *("files", "structure", "evidence", "verdict", "card", "provenance", "tag", "standing", "signature")
    ]


def test_weights_are_read_only_for_download(hub: LocalHub, repo_id: str, folder: Path) -> None:
    release_with_card(folder, repo_id)
    assert verify(repo_id).holds and not list(cache_folder().rglob("*.safetensors"))
    assert verify(repo_id, download=True).holds and list(cache_folder().rglob("*.safetensors"))


def test_a_good_folder_holds_and_has_no_tag(copied: Path) -> None:
    found = verify(str(copied))
    assert broken(found) == {} and unproven(found) == {"tag", *NOT_SIGNED} and found.commit is None


def test_a_second_release_of_the_same_checkpoint_holds_and_so_does_the_first(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    first = release_with_card(folder, repo_id)
    judge(folder, Checkpoint.load(folder / "fp8pipe" / "checkpoint.json"), lost=2)
    second = release_with_card(folder, repo_id)
    assert first.tag != second.tag
    assert all(verify(f"{repo_id}@{made.tag}").holds for made in (first, second))


# ---------------------------------------------------------------------------------------------- edits of a folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    packed = path.suffix == ".gz"
    content = json.loads(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    change(content)
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text) if packed else text)


def list_again(folder: Path) -> None:
    """Write a manifest that fits the folder, as a careful forger does."""
    path = folder / "fp8pipe" / "manifest.json"
    names = [name for name in published_files(folder) if name not in {"fp8pipe/manifest.json", "model.sig"}]
    files = file_hashes(folder, names)
    known = Manifest.load(path)
    known.model_copy(update={"files": files, "identity": identity_of(files)}).save(path)


@pytest.mark.parametrize("forged", [False, True], ids=["as-is", "manifest-forged"])
def test_one_flipped_byte_is_found(copied: Path, forged: bool) -> None:
    path = largest(copied)
    path.write_bytes(flip(path))
    if forged:
        list_again(copied)
    found = broken(verify(str(copied)))
    assert f"{path.name} changed" in found["evidence"]
    assert ("files" in found) is not forged and (forged or path.name in found["files"])


@pytest.mark.parametrize("name", ["notes.md", "pytorch_model.bin", "fp8pipe/weights.pkl"])
def test_an_added_file_is_found(copied: Path, name: str) -> None:
    (copied / name).write_bytes(b"late")
    assert f"{name}: is not in the manifest" in broken(verify(str(copied)))["files"]
    list_again(copied)
    assert name in broken(verify(str(copied)))["evidence"]


def test_a_missing_file_is_found(copied: Path) -> None:
    (copied / "fp8pipe" / "plan.json").unlink()
    found = broken(verify(str(copied)))
    assert "fp8pipe/plan.json: is in the manifest, but missing" in found["files"] and "plan.json" in found["evidence"]


def test_an_edited_number_in_the_card_is_found(copied: Path) -> None:
    card = (copied / "README.md").read_text()
    assert "89.80" in card
    (copied / "README.md").write_text(card.replace("89.80", "90.80"))
    list_again(copied)
    found = broken(verify(str(copied)))
    assert found.keys() == {"card"} and "90.80" in found["card"] and "89.80" in found["card"]


def test_an_edited_decision_is_found_whichever_field_it_is(copied: Path) -> None:
    path = copied / "fp8pipe" / "gate.json"
    original = path.read_bytes()
    content = json.loads(original)
    places = [(name,) for name in content]
    places += [(part, 0, name) for part in ("rules", "tasks") for name in content[part][0]]
    for place in places:
        path.write_bytes(original)
        edit_json(path, lambda record, place=place: other_value(record, place))
        list_again(copied)
        found = broken(verify(str(copied)))
        assert found.keys() & {"verdict", "evidence"}, place
    path.write_bytes(original)
    list_again(copied)
    assert verify(str(copied)).holds


def other_value(record: Any, place: tuple[str | int, ...]) -> None:  # Any: JSON
    """Give the entry at `place` another value of its type."""
    *way, last = place
    for key in way:
        record = record[key]
    value = record[last]
    if last == "verdict":
        record[last] = "inconclusive"
    elif last == "outcome":
        record[last] = "unchecked"
    elif isinstance(value, str):
        record[last] = f"{value}x"
    elif isinstance(value, list):
        record[last] = value[1:] if value else [earlier] if last == "earlier" else ["size"]
    else:
        record[last] = 1 if value is None else value + 1


earlier = {"recipe": "fp8-static", "fingerprint": "0", "reason": "dropped"}


@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_edited_samples_are_found(copied: Path, side: str) -> None:
    def better(report: dict[str, Any]) -> None:
        metric = report["tasks"][0]["metrics"][0]
        metric["values"] = [1.0] * len(metric["values"])
        metric["mean"] = 1.0

    edit_json(record_path(copied, side), better)
    list_again(copied)
    assert (
        f"{side}_report" in broken(verify(str(copied)))["verdict"] or "says" in broken(verify(str(copied)))["verdict"]
    )


def test_samples_and_decision_edited_together_are_found_by_the_card(copied: Path) -> None:
    """Whoever forges a whole measurement can only be told from its maker by a signature; half a forgery is found."""
    checkpoint = Checkpoint.load(copied / "fp8pipe" / "checkpoint.json")
    judge(copied, checkpoint, lost=0)
    list_again(copied)
    assert broken(verify(str(copied))).keys() == {"card"}


def test_a_record_of_another_checkpoint_is_found(copied: Path) -> None:
    edit_json(copied / "fp8pipe" / "checkpoint.json", lambda record: record.update(engine_version=1))
    list_again(copied)
    assert "fingerprint is not that of its source" in broken(verify(str(copied)))["evidence"]


def test_another_source_in_the_provenance_is_found(copied: Path) -> None:
    path = copied / "fp8pipe" / "provenance.json"
    text = path.read_text()
    path.write_text(text.replace("fp8-dynamic", "fp8-other"))
    list_again(copied)
    assert broken(verify(str(copied))).keys() == {"provenance"}


@pytest.mark.parametrize("name", ["fp8pipe/recipe.yaml", "fp8pipe/environment.json", ".eval_results/other.yaml"])
def test_an_edited_or_added_file_for_others_tools_is_found(copied: Path, name: str) -> None:
    path = copied / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b"\n# more")
    list_again(copied)
    found = broken(verify(str(copied)))
    assert found.keys() == {"provenance"} and name in found["provenance"]


@pytest.mark.parametrize("record", ["gate", "candidate", "policy", "plan", "manifest", "validation", "suite"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"a": NaN}'])
def test_a_record_that_is_none_is_broken_and_no_error(copied: Path, record: str, content: bytes) -> None:
    record_path(copied, record).write_bytes(content)
    assert not verify(str(copied)).holds


def test_a_folder_that_is_no_release_is_broken(model_folder: Callable[..., Path]) -> None:
    found = verify(str(model_folder("llama")))
    assert not found.holds and "no release of fp8pipe" in broken(found)["files"]


# ---------------------------------------------------------------------------------------------- edits on the Hub


def commit(repo_id: str, **files: bytes) -> None:
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
    client().create_commit(repo_id, operations, commit_message="edited")


def test_a_flipped_byte_and_an_added_file_on_the_hub_are_found_from_its_metadata(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    made = release_with_card(folder, repo_id)
    shard = largest(folder)
    commit(repo_id, **{shard.name: flip(shard), "extra/notes.md": b"late", ".hidden": b"late"})
    found = broken(verify(repo_id))
    assert all(f"{name}: " in found["files"] for name in (shard.name, "extra/notes.md", ".hidden"))
    assert made.tag in found["tag"] and shard.name in found["evidence"]
    assert verify(f"{repo_id}@{made.tag}").holds, "the release itself is what it was"


def test_a_moved_tag_is_found(hub: LocalHub, repo_id: str, folder: Path) -> None:
    first = release_with_card(folder, repo_id)
    judge(folder, Checkpoint.load(folder / "fp8pipe" / "checkpoint.json"), lost=2)
    second = release_with_card(folder, repo_id)
    client().delete_tag(repo_id, tag=first.tag)
    client().create_tag(repo_id, tag=first.tag, revision=second.commit)
    assert tags_of(repo_id) == {first.tag: second.commit, second.tag: second.commit}
    for target in (repo_id, f"{repo_id}@{first.tag}"):
        assert broken(verify(target)) == {"tag": f"tag {first.tag} was moved here, to the release {second.tag}"}


def test_a_deleted_tag_is_found(hub: LocalHub, repo_id: str, folder: Path) -> None:
    made = release_with_card(folder, repo_id)
    client().delete_tag(repo_id, tag=made.tag)
    assert "which the Hub does not have" in broken(verify(repo_id))["tag"]


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_page_and_exits_by_what_it_found(copied: Path) -> None:
    done = subprocess.run([FP8PIPE, "verify", str(copied)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(part in done.stdout for part in ("files", "verdict", "accepted", "card", "nothing is broken"))
    (copied / "notes.md").write_text("late")
    done = subprocess.run([FP8PIPE, "verify", str(copied), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["proofs"][0]["outcome"] == "broken"
