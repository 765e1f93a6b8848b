"""yank: what it changes on the Hub, what it leaves alone, and what later commands make of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.flows import run_flow
from support.provable import provable
from support.releases import commits, items, release, release_with_card, tags
from support.sample_folders import CHECKPOINT, STRICTER, gate_again, write_checkpoint, write_model
from typer.testing import CliRunner

from fp8pipe.cli import app
from fp8pipe.config import Target
from fp8pipe.errors import AccessDenied, HubUnreachable, InputError, ModelNotFound, RevisionNotFound, Withdrawn
from fp8pipe.hub.client import client
from fp8pipe.hub.target import check_target
from fp8pipe.records import Yanked
from fp8pipe.rehearsal.localhub import Disruption, LocalHub
from fp8pipe.release.verify import verify
from fp8pipe.release.yank import yank

REASON = "the tokenizer was wrong"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be published."""
    return write_checkpoint(tmp_path / "checkpoint")


def held(repo_id: str, name: str, revision: str = "main") -> str:
    """The text of a file of the repository."""
    return Path(client().hf_hub_download(repo_id, name, revision=revision)).read_text()


def test_a_yank_shows_a_banner_leaves_the_collections_and_keeps_the_tag(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    made = release(folder, repo_id)
    release(folder, repo_id, collection=f"acme/second {repo_id[-48:]}")
    withdrawal = yank(repo_id, REASON)
    card = held(repo_id, "README.md")
    assert card.startswith("---\nlicense: apache-2.0\n---\n<!-- fp8pipe: yanked -->\n> **Yanked: do not use")
    assert f"`{made.tag}`" in card and REASON in card and card.endswith(held(repo_id, "README.md", made.tag)[31:])
    assert items(made) == [] and len(withdrawal.left) == 2
    assert tags(repo_id) == {made.tag: made.commit} and commits(repo_id) == 2
    entry = Yanked.model_validate_json(held(repo_id, "fp8pipe/yanked.json")).of(made.tag)
    assert entry is not None and (entry.by, entry.reason) == ("local", REASON) and entry.when.endswith("+00:00")
    assert (withdrawal.newest, withdrawal.new_commit, withdrawal.yank) == (True, True, entry)


def test_a_yank_that_is_repeated_changes_nothing_and_another_reason_replaces_the_first(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    made = release(folder, repo_id)
    first = yank(repo_id, REASON)
    again = yank(f"{repo_id}@{made.tag}", f"  {REASON}\n")
    assert (again.commit, again.new_commit, again.yank, again.left) == (first.commit, False, first.yank, ())
    assert commits(repo_id) == 2
    yank(repo_id, "a licence that forbids it")
    card = held(repo_id, "README.md")
    assert commits(repo_id) == 3 and REASON not in card and card.count("Yanked") == 1


def test_an_earlier_release_is_yanked_beside_the_newest_which_stays_as_it_is(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    first = release(folder, repo_id)
    gate_again(folder, STRICTER)
    second = release(folder, repo_id)
    withdrawal = yank(f"{repo_id}@{first.tag}", REASON)
    assert not withdrawal.newest and withdrawal.left == ()
    assert items(second) == [(repo_id, "-0.1 points")]
    assert held(repo_id, "README.md") == held(repo_id, "README.md", second.tag)
    again = release(folder, repo_id)
    assert (again.tag, again.new_commit) == (second.tag, False), "it does not stand in the way of the newest"


@pytest.mark.parametrize("reason", ["<!-- fp8pipe: end of yanked -->", "a | b `c` [d](e) *f* <g>\n# h", "---"])
def test_no_reason_breaks_the_card(hub: LocalHub, repo_id: str, folder: Path, reason: str) -> None:
    made = release(folder, repo_id)
    yank(repo_id, reason)
    before = held(repo_id, "README.md", made.tag)
    assert re.sub(r"<!-- fp8pipe: yanked -->.*?<!-- fp8pipe: end of yanked -->\n\n", "", held(repo_id, "README.md"),
                  flags=re.DOTALL) == before  # fmt: skip
    banner = [line for line in held(repo_id, "README.md").splitlines() if line.startswith(">")]
    assert len(banner) == 3


# ---------------------------------------------------------------------------------------------- published again


def test_a_repository_whose_newest_release_was_yanked_takes_no_other_unless_told_to(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    made = release(folder, repo_id)
    yank(repo_id, REASON)
    others: list[dict[str, Any]] = [{}, {"replace": True}, {"supersedes": ("fp8-ab12ab12-9",)}]
    for options in others:
        with pytest.raises(Withdrawn, match=rf"{made.tag} was yanked by local .*{REASON}.*--supersedes {made.tag}"):
            release(folder, repo_id, **options)
        with pytest.raises(InputError, match="yanked"):
            check_target(Target(repo_id=repo_id, **options), CHECKPOINT.model_id, local=False)
    assert commits(repo_id) == 2 and items(made) == []

    second = release(folder, repo_id, supersedes=(made.tag,))
    assert second.tag == "fp8-ab12ab12-2" and second.new_commit, "what was yanked does not come back under its tag"
    assert held(repo_id, "README.md") == held(repo_id, "README.md", second.tag)
    assert "Yanked" not in held(repo_id, "README.md") and items(second) == [(repo_id, "-0.1 points")]
    again = release(folder, repo_id, supersedes=(made.tag,))
    assert (again.tag, again.commit, again.new_commit) == (second.tag, second.commit, False)
    assert Yanked.model_validate_json(held(repo_id, "fp8pipe/yanked.json")).of(made.tag), "it stays known"

    yank(repo_id, "again")
    with pytest.raises(InputError, match=f"--supersedes {second.tag}"):
        release(folder, repo_id, supersedes=(made.tag,))


def test_a_card_that_a_person_edited_after_the_yank_is_left_alone(hub: LocalHub, repo_id: str, folder: Path) -> None:
    made = release(folder, repo_id)
    yank(repo_id, REASON)
    text = held(repo_id, "README.md") + "PS\n"
    client().upload_file(repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=text.encode())
    with pytest.raises(InputError, match=r"README\.md was edited"):
        release(folder, repo_id, supersedes=(made.tag,))


def test_a_yanked_json_of_somebody_else_is_no_record(hub: LocalHub, repo_id: str, folder: Path) -> None:
    release(folder, repo_id)
    client().upload_file(repo_id=repo_id, path_in_repo="fp8pipe/yanked.json", path_or_fileobj=b'{"releases": 3}')
    for act in (lambda: release(folder, repo_id), lambda: yank(repo_id, REASON)):
        with pytest.raises(InputError, match=r"yanked\.json is not what fp8pipe writes there; remove it"):
            act()


# ---------------------------------------------------------------------------------------------- refusals


def test_what_is_no_release_is_not_yanked(hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        yank(repo_id, REASON)
    client().create_repo(repo_id)
    client().upload_folder(repo_id=repo_id, folder_path=write_model(tmp_path / "hand-made"))
    with pytest.raises(InputError, match="has no release of fp8pipe there"):
        yank(repo_id, REASON)
    assert commits(repo_id) == 1
    release(folder, repo_id, replace=True)
    with pytest.raises(RevisionNotFound, match=r"no release v1; its releases are fp8-ab12ab12-1"):
        yank(f"{repo_id}@v1", REASON)
    with pytest.raises(InputError, match="needs a reason"):
        yank(repo_id, " \n")
    assert commits(repo_id) == 2


def test_a_token_that_may_not_write_there_changes_nothing(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None]
) -> None:
    made = release(folder, repo_id)
    break_hub(Disruption(path="/commit/", action="status", status=403))
    with pytest.raises(AccessDenied):
        yank(repo_id, REASON)
    assert items(made) == [(repo_id, "-0.1 points")] and commits(repo_id) == 1


def test_a_private_repository_is_yanked_too(hub: LocalHub, repo_id: str, folder: Path) -> None:
    made = release(folder, repo_id, visibility="private")
    yank(repo_id, REASON)
    assert client().model_info(repo_id).private and commits(repo_id) == 2 and items(made) == []


# ---------------------------------------------------------------------------------------------- accidents

KILLED = """
import os, signal, sys
import httpx2
from fp8pipe.release.yank import yank

send, answers = httpx2.Client.send, 0

def counted(self, *args, **options):
    global answers
    answer = send(self, *args, **options)
    answers += 1
    if answers == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

httpx2.Client.send = counted
yank({repo_id!r}, {reason!r})
"""
MOMENTS = range(1, 30) if os.environ.get("FP8PIPE_LONG") else (6, 14, 20)
"""After how many answers of the Hub. A yank takes about 25."""


@pytest.mark.parametrize("number", MOMENTS)
def test_a_yank_killed_after_any_answer_of_the_hub_converges(
    hub: LocalHub, repo_id: str, folder: Path, number: int
) -> None:
    made = release(folder, repo_id)
    code = KILLED.format(number=number, repo_id=repo_id, reason=REASON)
    assert subprocess.run([sys.executable, "-c", code]).returncode in {-signal.SIGKILL, 0}
    yank(repo_id, REASON)
    assert commits(repo_id) == 2 and items(made) == [] and "Yanked" in held(repo_id, "README.md")


@pytest.mark.parametrize("action", ["drop-after", "drop-before", "status"])
@pytest.mark.parametrize(("path", "method"), [("/commit/", "POST"), ("/items/", "DELETE")])
def test_an_answer_that_is_lost_makes_nothing_twice(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None], path: str, method: str, action: Any
) -> None:
    made = release(folder, repo_id)
    break_hub(Disruption(path=path, action=action, method=method, status=502))
    with contextlib.suppress(HubUnreachable):
        yank(repo_id, REASON)
    yank(repo_id, REASON)
    assert commits(repo_id) == 2 and items(made) == []


@pytest.mark.parametrize("path", ["/commit/", "/items/", "/whoami"])
def test_a_quota_is_waited_for(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None], path: str
) -> None:
    made = release(folder, repo_id)
    break_hub(Disruption(path=path, action="status", status=429, retry_after="1"))
    yank(repo_id, REASON)
    assert commits(repo_id) == 2 and items(made) == []


# ---------------------------------------------------------------------------------------------- verify


def test_verify_finds_the_yank_and_nothing_else_wrong_and_still_finds_what_was_changed(
    hub: LocalHub, repo_id: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = provable(model_folder("llama"), tmp_path / "checkpoint")
    made = release_with_card(folder, repo_id)
    yank(repo_id, REASON)
    for target in (repo_id, f"{repo_id}@{made.tag}"):
        found = verify(target)
        broken = {proof.part: proof.found for proof in found.proofs if proof.outcome == "broken"}
        assert broken.keys() == {"standing"} and not found.holds, broken
        assert re.fullmatch(rf"{made.tag} was yanked by local on [\d-]{{10}}: {REASON}", broken["standing"][0])

    banner = held(repo_id, "README.md").replace("do not use", "do use")
    client().upload_file(repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=banner.encode())
    assert broken_parts(repo_id) == {"standing"}
    assert any("its banner is not what" in line for proof in verify(repo_id).proofs for line in proof.found)
    client().upload_file(repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=f"{banner}PS\n".encode())
    assert broken_parts(repo_id) == {"standing", "files", "card", "tag"}

    second = release_with_card(folder, repo_id, supersedes=(made.tag,), replace=True)
    assert verify(repo_id).holds and verify(f"{repo_id}@{second.tag}").holds
    assert broken_parts(f"{repo_id}@{made.tag}") == {"standing"}


def broken_parts(target: str) -> set[str]:
    return {proof.part for proof in verify(target).proofs if proof.outcome == "broken"}


# ---------------------------------------------------------------------------------------------- command and flow


def test_the_command_shows_what_changed_in_80_columns(
    hub: LocalHub, repo_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = release(folder, repo_id)
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, ["yank", repo_id, "--reason", REASON])
    assert done.exit_code == 0 and made.tag in done.output and REASON in done.output, done.output
    assert max(len(line.rstrip()) for line in done.output.splitlines()) <= 80
    refused = CliRunner().invoke(app, ["publish", str(folder), "--repo-id", repo_id, "--visibility", "public"])
    assert refused.exit_code == 2
    assert CliRunner().invoke(app, ["yank", f"{repo_id}@v2", "--reason", REASON]).exit_code == 2


@pytest.mark.prefect
def test_the_flow_does_the_same(hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path) -> None:
    made = release(folder, repo_id)
    code = f"from flows.yank_release import yank_release as run; print(run({repo_id!r}, {REASON!r}, return_state=True))"
    said = run_flow(code, tmp_path / "prefect")
    assert "Yanked" in said and f"{repo_id}@{made.tag}: {REASON}" in said
    assert commits(repo_id) == 2 and items(made) == []
