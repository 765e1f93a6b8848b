"""publish converges: killed at any step, or cut off by the Hub, the next run completes the same release."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import TESTS
from support.releases import CARD, commits, items, release
from support.sample_folders import write_checkpoint

from fp8pipe.errors import HubUnreachable
from fp8pipe.hub.client import client
from fp8pipe.hub.download import download
from fp8pipe.hub.source import resolve
from fp8pipe.progress import ProgressEvent
from fp8pipe.rehearsal.localhub import Disruption, LocalHub

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be published."""
    return write_checkpoint(tmp_path / "checkpoint")


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
    code = KILLED.format(tests=str(TESTS), step=step, folder=str(folder), repo_id=repo_id)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    made = release(folder, repo_id)
    assert commits(repo_id) == 1
    assert made.new_commit == (STEPS.index(step) <= STEPS.index("commit"))
    assert [ref.target_commit for ref in client().list_repo_refs(repo_id).tags] == [made.commit]
    assert not client().model_info(repo_id).private
    assert items(made) == [(repo_id, "-0.1 points")]


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
            client().upload_file(repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=b"---\ntags: [x]\n---\n")

    made = release(folder, repo_id, progress=race)
    assert raced and made.new_commit and commits(repo_id) == 2
    assert (download(resolve(repo_id)).path / "README.md").read_text() == CARD


def test_a_hub_that_stays_broken_leaves_a_private_repository_without_a_tag(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None]
) -> None:
    break_hub(Disruption(path="/commit/", action="status", status=503, times=2))
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
