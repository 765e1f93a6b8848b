"""publish: what it refuses, what it leaves on the Hub, and that it converges however often it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from support import TESTS
from support.releases import CARD, release
from support.reports import policy
from support.sample_folders import FINGERPRINT, accepted, measured, safetensors, validation, write_checkpoint

from fp8pipe.errors import HubUnreachable, InputError, Refused
from fp8pipe.hub.client import client
from fp8pipe.hub.download import download
from fp8pipe.hub.source import resolve
from fp8pipe.progress import ProgressEvent
from fp8pipe.records import Approval, Finding, GateDecision, Release
from fp8pipe.rehearsal.localhub import Fault, LocalHub
from fp8pipe.release.publish import load_evidence, publish

TAG = f"fp8pipe-{FINGERPRINT[:12]}"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be published."""
    return write_checkpoint(tmp_path / "checkpoint")


def commits(repo_id: str) -> int:
    """Commits on main after the one that every repository starts with."""
    return len(client().list_repo_commits(repo_id)) - 1


def items(release: Release) -> list[tuple[str, str | None]]:
    """Models and notes of the release's collection."""
    assert release.collection_slug is not None
    return [(item.item_id, item.note) for item in client().get_collection(release.collection_slug).items]


# ---------------------------------------------------------------------------------------------- the release


def test_release_is_public_tagged_listed_and_byte_for_byte_the_folder(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    made = release(folder, repo_id)

    info = client().model_info(repo_id)
    assert not info.private and info.sha == made.commit and made.new_commit
    assert commits(repo_id) == 1
    assert {ref.name: ref.target_commit for ref in client().list_repo_refs(repo_id).tags} == {TAG: made.commit}
    assert items(made) == [(repo_id, "-0.1 points")]
    assert made.repo_url == f"{hub.endpoint}/{repo_id}"

    fetched = download(resolve(f"{repo_id}@{TAG}"))
    for file in fetched.files:
        assert (fetched.path / file.name).read_bytes() == (folder / file.name).read_bytes(), file.name
    held = {file.rfilename for file in client().model_info(repo_id).siblings or ()}
    assert {"fp8pipe/checkpoint.json", "fp8pipe/gate.json", "fp8pipe/validation.json", "README.md"} < held
    assert held == {file.name for file in made.files} | {".gitattributes"}


def test_nobody_else_sees_a_release_before_it_is_verified_and_tagged(hub: LocalHub, repo_id: str, folder: Path) -> None:
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


def test_weights_are_hashed_once(hub: LocalHub, repo_id: str, folder: Path) -> None:
    release(folder, repo_id)
    shard, stat = folder / SHARD, (folder / SHARD).stat()
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a change that only reading every byte would show
    assert not release(folder, repo_id).new_commit


def test_hidden_half_made_and_local_files_stay_here(hub: LocalHub, repo_id: str, folder: Path) -> None:
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


def test_link_in_the_folder_is_not_followed(hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "notes.md").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"notes\.md: is a link"):
        release(folder, repo_id)
    assert not client().repo_exists(repo_id)


def test_note_of_an_existing_item_is_brought_up_to_date(hub: LocalHub, repo_id: str, folder: Path) -> None:
    release(folder, repo_id, note="old")
    assert items(release(folder, repo_id, note="new")) == [(repo_id, "new")]


def test_collection_is_found_by_slug_and_not_made_twice(hub: LocalHub, repo_id: str, folder: Path) -> None:
    slug = client().create_collection(repo_id[-50:], namespace="acme").slug
    by_slug = publish(folder, repo_id=repo_id, card=CARD, collection=slug, note="by slug")
    by_title = publish(folder, repo_id=repo_id, card=CARD, collection=f"acme/{repo_id[-50:]}", note="by title")
    assert by_slug.collection_slug == by_title.collection_slug == slug
    assert items(by_title) == [(repo_id, "by title")]


def test_collection_that_is_neither_title_nor_slug_is_bad_input(hub: LocalHub, repo_id: str, folder: Path) -> None:
    with pytest.raises(InputError, match="namespace/title"):
        publish(folder, repo_id=repo_id, collection="no-namespace")
    with pytest.raises(InputError, match="Collection not found"):
        publish(folder, repo_id=repo_id, collection=f"acme/gone-{'0' * 24}")


def test_note_that_the_hub_would_not_take_is_refused_before_anything_is_made(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    with pytest.raises(InputError, match="501 characters"):
        release(folder, repo_id, note="x" * 501)
    assert not client().repo_exists(repo_id)


def test_release_of_other_bytes_replaces_and_deletes_under_a_tag_of_its_own(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    first = release(folder, repo_id)
    (folder / "LICENSE").unlink()
    (folder / "NOTICE").write_text("new")
    with pytest.raises(InputError, match=f"tag {TAG} exists and holds other files"):
        release(folder, repo_id)
    assert commits(repo_id) == 1, "found out before the commit"
    second = release(folder, repo_id, tag="v2")
    held = {file.rfilename for file in client().model_info(repo_id, revision="v2").siblings or ()}
    assert "NOTICE" in held and "LICENSE" not in held and commits(repo_id) == 2
    assert resolve(f"{repo_id}@{TAG}").commit == first.commit != second.commit


def test_repository_of_somebody_elses_files_is_left_alone(hub: LocalHub, repo_id: str, folder: Path) -> None:
    client().create_repo(repo_id)
    client().upload_file(repo_id=repo_id, path_in_repo="model.safetensors", path_or_fileobj=safetensors(w=b"base"))
    with pytest.raises(InputError, match="name another repository"):
        release(folder, repo_id)
    assert commits(repo_id) == 1


# ---------------------------------------------------------------------------------------------- refusals


def replaced(folder: Path, **update: object) -> GateDecision:
    """The folder's gate decision, changed."""
    decision = accepted(folder).model_copy(update=update)
    decision.save(folder / "fp8pipe" / "gate.json")
    return decision


def test_nothing_is_published_without_each_record(hub: LocalHub, repo_id: str, folder: Path) -> None:
    for name in ("checkpoint", "validation", "candidate", "gate"):
        path = folder / "fp8pipe" / f"{name}.json"
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(Refused, match=rf"{name}\.json"):
            release(folder, repo_id)
        path.write_bytes(content[:-20])
        with pytest.raises(Refused, match=rf"{name}\.json"):
            release(folder, repo_id)
        path.write_bytes(content)
    assert not client().repo_exists(repo_id)


@pytest.mark.parametrize(
    ("update", "objection"),
    [
        ({"verdict": "rejected", "reason": "dropped 3 points"}, "rejected it: dropped 3 points"),
        ({"vetoed": ("tokenizer",)}, "rejected"),
        ({"unchecked": ("kernels",)}, "unchecked: kernels"),
        ({"unchecked": ("speed", "memory")}, "unchecked: speed, memory"),
        ({"candidate_fingerprint": "cd34" * 16}, "decided on checkpoint cd34cd34cd34, this is ab12ab12ab12"),
        ({"verdict": "inconclusive", "reason": "too few samples"}, "there is no approval: too few samples"),
    ],
)
def test_gate_that_did_not_accept_this_very_checkpoint_forbids_it(
    hub: LocalHub, repo_id: str, folder: Path, update: dict[str, object], objection: str
) -> None:
    replaced(folder, **update)
    with pytest.raises(Refused, match=objection) as error:
        release(folder, repo_id)
    assert error.value.exit_code == 1
    assert not client().repo_exists(repo_id)


def test_rejected_checkpoint_is_not_published_even_with_an_approval(hub: LocalHub, repo_id: str, folder: Path) -> None:
    decision = replaced(folder, verdict="rejected", reason="dropped 3 points")
    approve(folder, decision)
    with pytest.raises(Refused, match="rejected"):
        release(folder, repo_id)


def approve(folder: Path, decision: GateDecision) -> None:
    approval = Approval(who="release team", when="2026-01-01T00:00:00Z", reason="known", decision=decision.digest())
    approval.save(folder / "fp8pipe" / "approval.json")


def test_inconclusive_checkpoint_is_published_with_an_approval_of_that_decision_only(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    asking = policy(on_inconclusive="ask")
    (folder / "fp8pipe" / "policy.json").write_text(asking.model_dump_json())
    known = {"verdict": "inconclusive", "policy_digest": asking.digest()}
    approve(folder, replaced(folder, **known, reason="too few samples"))
    made = release(folder, repo_id)
    assert made.verdict == "inconclusive" and "fp8pipe/approval.json" in {file.name for file in made.files}
    replaced(folder, **known, reason="still too few")
    with pytest.raises(Refused, match="approval is of another decision"):
        release(folder, repo_id)


def test_an_approval_counts_only_under_the_policy_that_lets_people_decide(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    stopping, asking = policy(), policy(on_inconclusive="ask")
    path = folder / "fp8pipe" / "policy.json"
    approve(folder, replaced(folder, verdict="inconclusive", policy_digest=stopping.digest()))
    for written, objection in (
        (stopping.model_dump_json(), "stops where the gate is inconclusive"),
        (asking.model_dump_json(), "not the policy that the gate decided by"),
        ("{", "missing or no policy"),
    ):
        path.write_text(written)
        with pytest.raises(Refused, match=objection):
            release(folder, repo_id)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SHARD])
def test_folder_edited_after_its_validation_is_refused(folder: Path, name: str) -> None:
    load_evidence(folder)
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    with pytest.raises(Refused, match="changed since it was validated"):
        load_evidence(folder)


def test_folder_validated_anew_but_not_measured_anew_is_refused(folder: Path) -> None:
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    validation(folder).save(folder / "fp8pipe" / "validation.json")
    with pytest.raises(Refused, match="changed since it was measured"):
        load_evidence(folder)


def test_measurement_that_the_gate_did_not_see_is_refused(folder: Path) -> None:
    measured(folder).model_copy(update={"suite": "easier"}).save(folder / "fp8pipe" / "candidate.json")
    with pytest.raises(Refused, match="not the measurement that the gate decided on"):
        load_evidence(folder)


def test_unsound_folder_is_refused_and_every_objection_is_told(folder: Path) -> None:
    finding = Finding(check="K2", severity="error", expected="scale", found="none", remedy="rerun quantize")
    validation(folder).model_copy(update={"findings": (finding,)}).save(folder / "fp8pipe" / "validation.json")
    replaced(folder, verdict="rejected", unchecked=("kernels",))
    with pytest.raises(Refused) as error:
        load_evidence(folder)
    assert all(word in str(error.value) for word in ("K2", "rejected", "unchecked: kernels"))


# ---------------------------------------------------------------------------------------------- accidents

STEPS = (
    *(f"hash {SHARD}", "create repository", "upload small files", f"upload {SHARD}", f"uploaded {SHARD}", "commit"),
    *("verify", "tag", "make public", "collection", "done"),
)
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.releases import release

def die(event):
    if event.note == {step!r}:
        os.kill(os.getpid(), signal.SIGKILL)

release(Path({folder!r}), {repo_id!r}, progress=die)
"""


def test_steps_of_the_accident_tests_are_the_steps_of_publish(hub: LocalHub, repo_id: str, folder: Path) -> None:
    events: list[ProgressEvent] = []
    release(folder, repo_id, progress=events.append)
    assert [event.note for event in events if event.note in STEPS] == list(STEPS)
    shards = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    sent = next(event.done for event in events if event.note == "commit")
    assert sent == shards < events[-1].done == events[-1].total, "small files travel in the commit"


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_and_run_again_it_converges(hub: LocalHub, repo_id: str, folder: Path, step: str) -> None:
    code = KILLED.format(tests=str(TESTS), step=step, folder=str(folder), repo_id=repo_id)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    made = release(folder, repo_id)
    assert commits(repo_id) == 1
    assert made.new_commit == (STEPS.index(step) <= STEPS.index("commit"))
    assert [ref.target_commit for ref in client().list_repo_refs(repo_id).tags] == [made.commit]
    assert not client().model_info(repo_id).private
    assert items(made) == [(repo_id, "-0.1 points")]


def test_commit_whose_answer_was_lost_is_not_made_twice(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None]
) -> None:
    break_hub(Fault(path="/commit/", action="drop-after"))
    made = release(folder, repo_id)
    assert made.new_commit and commits(repo_id) == 1


def test_commit_that_failed_once_is_tried_once_more(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None]
) -> None:
    break_hub(Fault(path="/commit/", action="status", status=503))
    assert release(folder, repo_id).new_commit
    assert commits(repo_id) == 1


def test_commit_that_lost_a_race_is_made_anew_on_the_new_head(hub: LocalHub, repo_id: str, folder: Path) -> None:
    raced: list[str] = []

    def race(event: ProgressEvent) -> None:
        if event.note == "commit" and not raced:
            raced.append(event.note)
            client().upload_file(repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=b"---\ntags: [x]\n---\n")

    made = release(folder, repo_id, progress=race)
    assert raced and made.new_commit and commits(repo_id) == 2
    assert (download(resolve(repo_id)).path / "README.md").read_text() == CARD


def test_hub_that_stays_broken_leaves_a_private_repository_without_a_tag(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None]
) -> None:
    break_hub(Fault(path="/commit/", action="status", status=503, times=2))
    with pytest.raises(HubUnreachable, match=f"publishing to {repo_id}.*HTTP 503"):
        release(folder, repo_id)
    assert client().model_info(repo_id).private and not client().list_repo_refs(repo_id).tags
    assert release(folder, repo_id).new_commit, "the next run goes on"


def test_upload_that_is_cut_off_says_so_and_the_next_run_goes_on(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None]
) -> None:
    break_hub(Fault(path="^/_lfs/", method="PUT", action="status", status=501))
    with pytest.raises(HubUnreachable, match="HTTP 501"):
        release(folder, repo_id)
    assert release(folder, repo_id).new_commit
