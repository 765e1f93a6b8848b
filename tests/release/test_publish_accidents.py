"""publish converges: killed at any step, or cut off by the Hub, the next run completes the same release."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import TESTS
from support.releases import card, commits, items, release, tags
from support.sample_folders import STRICTER, gate_again, write_checkpoint

from fp8pipe.errors import AccessDenied, HubUnreachable
from fp8pipe.hub.client import client
from fp8pipe.hub.commits import ROUNDS
from fp8pipe.hub.download import download
from fp8pipe.hub.source import resolve
from fp8pipe.progress import ProgressEvent
from fp8pipe.rehearsal.localhub import Disruption, LocalHub

SHARD = "model-00001-of-00002.safetensors"
LAST_SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be published."""
    return write_checkpoint(tmp_path / "checkpoint")


STEPS = (
    *("check target", "hash", "create repository", "upload small files", "upload weights"),
    *(f"uploaded {LAST_SHARD}", "commit", "verify", "tag", "make public", "collection", "done"),
)
NEXT_STEPS = (
    *("check target", "hash", "upload small files", "upload weights", "commit"),
    *("verify pull request", "merge", "verify", "tag", "collection", "done"),
)
"""Of a later release, in a repository that everybody sees."""
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.releases import release

def die(event):
    if event.note == {step!r}:
        os.kill(os.getpid(), signal.SIGKILL)

release(Path({folder!r}), {repo_id!r}, progress=die, **{options!r})
"""


def killed(folder: Path, repo_id: str, step: str, **options: str) -> None:
    """Publish in a process that is killed as it begins `step`."""
    code = KILLED.format(tests=str(TESTS), step=step, folder=str(folder), repo_id=repo_id, options=options)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL


def test_the_steps_of_these_tests_are_the_steps_of_publish(hub: LocalHub, repo_id: str, folder: Path) -> None:
    events: list[ProgressEvent] = []
    release(folder, repo_id, progress=events.append)
    assert [event.note for event in events if event.note in STEPS] == list(STEPS)
    shards = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    sent = next(event.done for event in events if event.note == "commit")
    assert sent == shards < events[-1].done == events[-1].total, "small files travel in the commit"


@pytest.mark.parametrize("step", STEPS)
def test_a_release_killed_at_any_step_converges_when_run_again(
    hub: LocalHub, repo_id: str, folder: Path, step: str
) -> None:
    killed(folder, repo_id, step)
    made = release(folder, repo_id)
    assert commits(repo_id) == 1
    assert made.new_commit == (STEPS.index(step) <= STEPS.index("commit"))
    assert list(tags(repo_id).values()) == [made.commit]
    assert not client().model_info(repo_id).private
    assert items(made) == [(repo_id, "-0.1 points")]


def pulls(repo_id: str) -> list[tuple[int, str]]:
    """Number and status of every pull request."""
    return sorted((pull.num, pull.status) for pull in client().get_repo_discussions(repo_id))


def test_a_later_release_goes_through_a_pull_request_that_is_verified_first(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    first = release(folder, repo_id)
    gate_again(folder, STRICTER)
    notes: list[str] = []
    seen: list[str | None] = []

    def look(event: ProgressEvent) -> None:
        notes.append(event.note)
        if event.note in {"verify pull request", "merge"}:
            seen.append(client().model_info(repo_id).sha)

    second = release(folder, repo_id, progress=look)
    assert [note for note in notes if note in NEXT_STEPS] == list(NEXT_STEPS)
    assert seen == [first.commit] * 2, "main is what it was until the pull request was verified"
    assert pulls(repo_id) == [(1, "merged")]
    assert tags(repo_id)[second.tag] == second.commit == client().model_info(repo_id).sha


@pytest.mark.parametrize("step", NEXT_STEPS)
def test_a_later_release_killed_at_any_step_converges_when_run_again(
    hub: LocalHub, repo_id: str, folder: Path, step: str
) -> None:
    first = release(folder, repo_id)
    gate_again(folder, STRICTER)
    killed(folder, repo_id, step)
    made = release(folder, repo_id)
    assert commits(repo_id) == 2
    assert tags(repo_id) == {first.tag: first.commit, made.tag: made.commit}
    assert pulls(repo_id) == [(1, "merged")]
    assert items(made) == [(repo_id, "-0.1 points")]


KILLED_AFTER_AN_ANSWER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import httpx2
from support.releases import release

send, answers = httpx2.Client.send, 0

def counted(self, *args, **options):
    global answers
    answer = send(self, *args, **options)
    answers += 1
    if answers == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

httpx2.Client.send = counted
release(Path({folder!r}), {repo_id!r})
"""
MOMENTS = random.Random(14).sample(range(1, 45), 30 if os.environ.get("FP8PIPE_LONG") else 4)
"""After how many answers of the Hub, which the killed process never uses. A release takes about 45."""


@pytest.mark.parametrize("number", MOMENTS)
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
def test_a_release_killed_after_any_answer_of_the_hub_converges_when_run_again(
    hub: LocalHub, repo_id: str, folder: Path, later: bool, number: int
) -> None:
    if later:
        release(folder, repo_id, words="before")
    code = KILLED_AFTER_AN_ANSWER.format(tests=str(TESTS), number=number, folder=str(folder), repo_id=repo_id)
    assert subprocess.run([sys.executable, "-c", code]).returncode in {-signal.SIGKILL, 0}
    made = release(folder, repo_id)
    assert commits(repo_id) == len(tags(repo_id)) == 1 + later
    assert tags(repo_id)[made.tag] == made.commit == client().model_info(repo_id).sha
    assert items(made) == [(repo_id, "-0.1 points")]
    assert not client().model_info(repo_id).private
    assert [status for _, status in pulls(repo_id) if status == "open"] == []
    assert all(hub.log.read_text().count(f'"PUT /_lfs/{sha256}') == 1 for sha256 in shards(folder)), (
        "weights are sent once"
    )


def shards(folder: Path) -> list[str]:
    """The hashes of the weights."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")]


def test_a_pull_request_of_a_killed_run_with_other_content_is_closed(hub: LocalHub, repo_id: str, folder: Path) -> None:
    release(folder, repo_id)
    killed(folder, repo_id, "verify pull request", words="a template with a fault")
    release(folder, repo_id, words="the template mended")
    assert pulls(repo_id) == [(1, "closed"), (2, "merged")]
    assert commits(repo_id) == 2


@pytest.mark.parametrize("action", ["drop-after", "drop-before", "status"])
@pytest.mark.parametrize("path", ["/commit/", "/merge$", "/tag/"])
def test_an_answer_of_a_later_release_that_is_lost_makes_nothing_twice(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None], path: str, action: Any
) -> None:
    release(folder, repo_id)
    gate_again(folder, STRICTER)
    break_hub(Disruption(path=path, action=action, method="POST", status=502))
    with contextlib.suppress(HubUnreachable):  # only a tag is not tried again at once
        release(folder, repo_id)
    made = release(folder, repo_id)
    assert commits(repo_id) == 2 and [status for _, status in pulls(repo_id)] == ["merged"]
    assert tags(repo_id)[made.tag] == made.commit == client().model_info(repo_id).sha


def test_another_commit_before_the_merge_is_not_mixed_into_the_release(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    release(folder, repo_id)
    gate_again(folder, STRICTER)
    raced: list[str] = []

    def race(event: ProgressEvent) -> None:
        if event.note == "verify pull request" and not raced:
            raced.append(event.note)
            client().upload_file(repo_id=repo_id, path_in_repo="notes.txt", path_or_fileobj=b"mine")

    made = release(folder, repo_id, progress=race)
    assert raced and pulls(repo_id) == [(1, "closed"), (2, "merged")]
    assert {file.name for file in made.files} == {file.name for file in resolve(repo_id).files} - {".gitattributes"}


@pytest.mark.parametrize("public", [False, True])
def test_publishers_of_the_same_content_make_one_commit_and_one_tag(
    hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path, public: bool
) -> None:
    if public:
        release(folder, repo_id, words="before")
    folders = [tmp_path / f"copy{number}" for number in range(3)]
    for copy in folders:
        shutil.copytree(folder, copy, copy_function=shutil.copy2)
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda copy: release(copy, repo_id, visibility="public"), folders))
    assert len({(one.tag, one.commit) for one in made}) == 1
    assert commits(repo_id) == len(tags(repo_id)) == 1 + public
    assert [status for _, status in pulls(repo_id) if status == "open"] == []


def test_publishers_of_different_content_each_get_a_tag_that_holds_it(
    hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path
) -> None:
    release(folder, repo_id, words="before")
    folders = {f"content {number}": tmp_path / f"copy{number}" for number in range(2)}
    for copy in folders.values():
        shutil.copytree(folder, copy, copy_function=shutil.copy2)
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda words: release(folders[words], repo_id, words=words), folders))
    assert {one.tag for one in made} == {"fp8-ab12ab12-2", "fp8-ab12ab12-3"}
    for words, one in zip(folders, made, strict=True):
        assert (download(resolve(f"{repo_id}@{one.tag}")).path / "README.md").read_text() == card(one.tag, words=words)
    assert [status for _, status in pulls(repo_id) if status == "open"] == []


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None]
) -> None:
    break_hub(Disruption(path="/commit/", action="drop-after"))
    made = release(folder, repo_id)
    assert made.new_commit and commits(repo_id) == 1


def test_a_commit_that_failed_once_is_tried_once_more(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None]
) -> None:
    break_hub(Disruption(path="/commit/", action="status", status=503))
    assert release(folder, repo_id).new_commit
    assert commits(repo_id) == 1


def test_a_commit_that_lost_a_race_is_made_again_on_the_new_head(hub: LocalHub, repo_id: str, folder: Path) -> None:
    raced: list[str] = []

    def race(event: ProgressEvent) -> None:
        if event.note == "commit" and not raced:
            raced.append(event.note)
            client().upload_file(repo_id=repo_id, path_in_repo=".gitattributes", path_or_fileobj=b"*.x filter=lfs\n")

    made = release(folder, repo_id, progress=race)
    assert raced and made.new_commit and commits(repo_id) == 2
    assert client().model_info(repo_id).sha == made.commit


@pytest.mark.parametrize(
    "path", ["/whoami", "/create$", "/preupload/", "/lfs/", "/commit/", "/tag/", "/settings$", "/items$"]
)
def test_a_quota_is_waited_for_at_any_step(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None], path: str
) -> None:
    break_hub(Disruption(path=path, action="status", status=429, retry_after="1"))
    notes: list[str] = []
    made = release(folder, repo_id, progress=lambda event: notes.append(event.note))
    assert commits(repo_id) == len(tags(repo_id)) == len(items(made)) == 1
    assert path == "/whoami" or "wait 2 s, as the Hub asks" in notes


@pytest.mark.parametrize("status", [401, 403, 500, 503])
@pytest.mark.parametrize("path", ["/create$", "/preupload/", "/commit/", "/tag/", "/settings$", "/collections"])
def test_an_error_at_any_step_is_one_of_ours_and_the_next_run_converges(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None], path: str, status: int
) -> None:
    break_hub(Disruption(path=path, action="status", status=status))
    with contextlib.suppress(AccessDenied, HubUnreachable):
        release(folder, repo_id)
    break_hub()
    made = release(folder, repo_id)
    assert commits(repo_id) == len(tags(repo_id)) == len(items(made)) == 1
    assert not client().model_info(repo_id).private


def test_a_hub_that_stays_broken_leaves_a_private_repository_without_a_tag(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None]
) -> None:
    break_hub(Disruption(path="/commit/", action="status", status=503, times=ROUNDS))
    with pytest.raises(HubUnreachable, match=f"publishing to {repo_id}.*HTTP 503"):
        release(folder, repo_id)
    assert client().model_info(repo_id).private and not client().list_repo_refs(repo_id).tags
    assert release(folder, repo_id).new_commit, "the next run completes it"


def test_an_upload_that_is_cut_off_says_so_and_the_next_run_completes_it(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None]
) -> None:
    break_hub(Disruption(path="^/_lfs/", method="PUT", action="status", status=501))
    with pytest.raises(HubUnreachable, match="HTTP 501"):
        release(folder, repo_id)
    assert release(folder, repo_id).new_commit
