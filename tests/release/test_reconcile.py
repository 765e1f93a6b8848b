"""reconcile: the plan, its changes on the Hub, and every way in which they may be interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.collections import collection_of, listed
from support.flows import run_flow
from support.releases import release
from support.sample_folders import write_checkpoint, write_model
from typer.testing import CliRunner

from fp8pipe.cli import app
from fp8pipe.config import CollectionSpec
from fp8pipe.errors import AccessDenied, HubUnreachable
from fp8pipe.hub.client import client
from fp8pipe.records import GateDecision
from fp8pipe.rehearsal.localhub import Disruption, LocalHub
from fp8pipe.release.card.verdict import collection_note
from fp8pipe.release.reconcile import reconcile
from fp8pipe.release.yank import yank

Actions = set[tuple[str, str]]


@pytest.fixture
def title(repo_id: str) -> str:
    """The title of a collection that no other test uses."""
    return f"FP8 {repo_id[-50:]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be published."""
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def note(folder: Path) -> str:
    """The note of its verdict."""
    return collection_note(GateDecision.load(folder / "fp8pipe" / "gate.json"))


def actions(spec: CollectionSpec, *, apply: bool = False) -> Actions:
    return {(change.action, change.repo_id) for change in reconcile(spec, apply=apply).changes}


@pytest.fixture
def drifted(repo_id: str, title: str, folder: Path, tmp_path: Path) -> CollectionSpec:
    """A file of three releases; its collection lists one with another note, one that is not in the file, a model of
    other people, but not the second, and the third was never made."""
    first, second, other, foreign = (f"{repo_id}-{name}" for name in ("1", "2", "other", "foreign"))
    release(folder, first, collection=f"acme/{title}", note="an old note")
    release(folder, second, collection=None)
    release(folder, other, collection=f"acme/{title}")
    client().create_repo(foreign)
    client().upload_folder(repo_id=foreign, folder_path=write_model(tmp_path / "foreign"))
    slug = next(one.slug for one in client().list_collections(owner="acme") if one.title == title)
    client().add_collection_item(slug, foreign, "model", note="ours by hand")
    return collection_of(first, second, f"{repo_id}-3", title=title)


def converged(repo_id: str, note: str) -> dict[str, str | None]:
    return {f"{repo_id}-1": note, f"{repo_id}-2": note, f"{repo_id}-foreign": "ours by hand"}


def test_a_plan_says_what_would_change_and_changes_nothing_and_apply_makes_it_so(
    hub: LocalHub, repo_id: str, title: str, drifted: CollectionSpec, note: str
) -> None:
    before = listed(title)
    planned = reconcile(drifted)
    assert {(change.action, change.repo_id) for change in planned.changes} == {
        ("update", f"{repo_id}-1"),
        ("add", f"{repo_id}-2"),
        ("remove", f"{repo_id}-other"),
    }
    assert planned.missing == (f"acme/tiny, fp8-static-kv: not published as {repo_id}-3",)
    assert planned.kept == (f"{repo_id}-foreign in acme/{title}: no release of fp8pipe",)
    assert not planned.applied and listed(title) == before
    made = reconcile(drifted, apply=True)
    assert made.changes == planned.changes and made.applied
    assert listed(title) == converged(repo_id, note)
    assert actions(drifted) == set() and not reconcile(drifted, apply=True).applied


def test_a_collection_that_does_not_exist_is_made_by_apply_with_the_files_description(
    hub: LocalHub, repo_id: str, title: str, folder: Path, note: str
) -> None:
    release(folder, repo_id, collection=None)
    about = {"namespace": "acme", "title": title, "description": "checked"}
    spec = collection_of(repo_id, title=title, collection=about)
    assert actions(spec) == {("add", repo_id)} and listed(title) == {}
    reconcile(spec, apply=True)
    assert listed(title) == {repo_id: note}
    made = next(one for one in client().list_collections(owner="acme") if one.title == title)
    assert made.description == "checked"


def test_nothing_published_leaves_no_empty_collection(hub: LocalHub, repo_id: str, title: str) -> None:
    spec = collection_of(repo_id, title=title)
    assert reconcile(spec, apply=True).missing
    assert title not in {one.title for one in client().list_collections(owner="acme")}


def test_what_was_yanked_is_removed_and_not_added_again(
    hub: LocalHub, repo_id: str, title: str, folder: Path, note: str
) -> None:
    release(folder, repo_id, collection=f"acme/{title}", note=note)
    spec = collection_of(repo_id, title=title)
    assert actions(spec) == set()
    yank(repo_id, "the tokenizer was wrong")
    assert actions(spec) == set() and "the tokenizer was wrong" in reconcile(spec).missing[0]
    slug = next(one.slug for one in client().list_collections(owner="acme") if one.title == title)
    client().add_collection_item(slug, repo_id, "model", note=note)  # somebody puts it back
    assert actions(spec, apply=True) == {("remove", repo_id)}
    assert listed(title) == {}


def test_a_repository_of_another_model_or_recipe_is_not_listed_for_this_one(
    hub: LocalHub, repo_id: str, title: str, folder: Path
) -> None:
    release(folder, repo_id, collection=f"acme/{title}")
    spec = collection_of(repo_id, title=title, model="acme/other")
    found = reconcile(spec)
    assert [(change.action, change.why) for change in found.changes] == [
        ("remove", "the file names no release of acme/tiny with fp8-static-kv")
    ]
    assert f"{repo_id} holds acme/tiny, fp8-static-kv" in found.missing[0]


def test_a_release_by_a_fallback_recipe_counts_as_that_of_its_entry(
    hub: LocalHub, repo_id: str, title: str, folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "first.yaml"
    shipped = yaml.safe_load((Path(__file__).parents[2] / "configs/recipes/fp8-dynamic.yaml").read_text())
    recipe.write_text(yaml.safe_dump(shipped | {"name": "first", "fallback": ["fp8-static-kv"]}))
    rules = yaml.safe_load((Path(__file__).parents[2] / "configs/gates/quick.yaml").read_text())
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules | {"max_attempts": 2}))
    release(folder, repo_id, collection=None)
    spec = collection_of(repo_id, title=title, recipes=[str(recipe)], policy=str(tmp_path / "rules.yaml"))
    assert actions(spec) == {("add", repo_id)} and not reconcile(spec).missing


def test_a_release_whose_tag_was_never_made_is_not_listed(
    hub: LocalHub, repo_id: str, title: str, folder: Path
) -> None:
    made = release(folder, repo_id, collection=None)
    client().delete_tag(repo_id, tag=made.tag)
    assert actions(collection_of(repo_id, title=title)) == set()


def test_apply_without_a_token_changes_nothing(
    hub: LocalHub, repo_id: str, title: str, drifted: CollectionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listed(title)
    monkeypatch.delenv("HF_TOKEN")
    assert reconcile(drifted).changes, "a plan of what is public needs no token"
    with pytest.raises(AccessDenied):
        reconcile(drifted, apply=True)
    assert listed(title) == before


# ---------------------------------------------------------------------------------------------- interrupted

KILLED = """
import json, os, signal, sys, httpx2
from fp8pipe.config import CollectionSpec
from fp8pipe.release.reconcile import reconcile

answers, send = 0, httpx2.Client.send

def counted(self, *args, **options):
    global answers
    answer = send(self, *args, **options)
    answers += 1
    if answers == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

httpx2.Client.send = counted
reconcile(CollectionSpec.model_validate_json(sys.argv[1]), apply=True)
"""
MOMENTS = range(34, 57) if os.environ.get("FP8PIPE_LONG") else (37, 40)
"""After how many answers of the Hub. The first change is asked for after 36."""


@pytest.mark.parametrize("number", MOMENTS)
def test_killed_after_any_answer_of_the_hub_it_converges(
    hub: LocalHub, repo_id: str, title: str, drifted: CollectionSpec, note: str, number: int
) -> None:
    command = [sys.executable, "-c", KILLED.format(number=number), drifted.model_dump_json()]
    assert subprocess.run(command).returncode in {-signal.SIGKILL, 0}
    reconcile(drifted, apply=True)
    assert listed(title) == converged(repo_id, note)


@pytest.mark.parametrize(
    ("method", "action"),
    [("POST", "drop-after"), ("PATCH", "drop-after"), ("DELETE", "drop-after"), ("POST", "status")],
)
def test_an_answer_that_is_lost_does_nothing_twice(
    hub: LocalHub,
    repo_id: str,
    title: str,
    drifted: CollectionSpec,
    note: str,
    break_hub: Callable[..., None],
    method: str,
    action: Any,
) -> None:
    break_hub(Disruption(path="/items?", action=action, method=method, status=502))
    with contextlib.suppress(HubUnreachable):
        reconcile(drifted, apply=True)
    reconcile(drifted, apply=True)
    assert listed(title) == converged(repo_id, note)


# ---------------------------------------------------------------------------------------------- command and flow


def test_the_command_fits_80_columns_and_its_exit_code_says_whether_the_collection_differs(
    hub: LocalHub, drifted: CollectionSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "collection.yaml"
    file.write_text(yaml.safe_dump(drifted.model_dump(mode="json")))
    monkeypatch.setenv("COLUMNS", "80")
    planned = CliRunner().invoke(app, ["reconcile", str(file)])
    assert planned.exit_code == 1 and "1 to add, 1 to update, 1 to remove" in planned.output, planned.output
    assert max(len(line.rstrip()) for line in planned.output.splitlines() if "fp8pipe" not in line) <= 80
    made = CliRunner().invoke(app, ["reconcile", str(file), "--apply", "--json"])
    assert made.exit_code == 0 and json.loads(made.stdout)["applied"]
    again = CliRunner().invoke(app, ["reconcile", str(file)])
    assert again.exit_code == 0 and "Nothing to do" in again.output


@pytest.mark.prefect
def test_the_flows_do_the_same(
    hub: LocalHub, title: str, repo_id: str, drifted: CollectionSpec, note: str, tmp_path: Path
) -> None:
    file = tmp_path / "collection.yaml"
    file.write_text(yaml.safe_dump(drifted.model_dump(mode="json")))
    code = (
        "from flows.reconcile_collection import reconcile_collection as run\n"
        "from flows.collection_status import collection_status as status\n"
        f"print(run({str(file)!r}, return_state=True))\n"
        f"print(run({str(file)!r}, apply=True, return_state=True))\n"
        f"print(status({str(file)!r}, return_state=True))\n"
    )
    said = run_flow(code, tmp_path / "prefect")
    assert "Differs" in said and "Reconciled" in said and "3 changes, 1 releases not on the Hub" in said
    assert "2 published, 1 missing" in said
    assert listed(title) == converged(repo_id, note)
