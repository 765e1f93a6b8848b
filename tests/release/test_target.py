"""What is asked of the Hub before anything is made or published: where, by whom, over what, and who would see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from support.releases import card, commits, release, tags
from support.reports import policy, suite
from support.sample_folders import CHECKPOINT, STRICTER, gate_again, safetensors, write_checkpoint, write_model

from fp8pipe import stages
from fp8pipe.config import ReleaseSpec, ResolvedRelease, Target, load_recipe
from fp8pipe.errors import AccessDenied, HubUnreachable, InputError
from fp8pipe.hub.client import client
from fp8pipe.hub.target import check_target
from fp8pipe.progress import ProgressEvent
from fp8pipe.rehearsal import localhub
from fp8pipe.rehearsal.localhub import Disruption, LocalHub, TokenOwner

BASE = CHECKPOINT.model_id

TOKENS = {
    "write": TokenOwner("ann", ("acme",)),
    "read": TokenOwner("ann", ("acme",), "read"),
    "fine": TokenOwner("ann", ("acme", "other"), "fineGrained", {"acme": ("repo.content.read", "repo.write")}),
    "fine-read": TokenOwner("ann", ("acme",), "fineGrained", {"acme": ("repo.content.read",)}),
    "fine-repo": TokenOwner("ann", ("acme",), "fineGrained", {"acme/only": ("repo.write",)}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be published."""
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def strict_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A Hub on which tokens have owners, roles and scopes."""
    with localhub.start(tmp_path_factory.mktemp("strict"), tokens=TOKENS) as server:
        yield server


@pytest.fixture
def log_in(hub: LocalHub, strict_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`log_in(token)` on the strict Hub."""

    def set_token(token: str) -> None:
        monkeypatch.setenv("HF_ENDPOINT", strict_hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", token)

    return set_token


def check(repo_id: str, *, local: bool = False, **target: Any) -> Any:
    return check_target(Target(repo_id=repo_id, **target), BASE, local=local)


# ---------------------------------------------------------------------------------------------- the token


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        ("read", "acme/x", r"acme/x: the token 'local' may only read"),
        ("write", "strangers/x", "belongs to ann, who may not create repositories of strangers, only of: ann, acme"),
        ("fine", "other/x", r"is fine-grained and lacks the permission repo\.write for other"),
        ("fine-read", "acme/x", r"lacks the permission repo\.write for acme"),
        ("fine-repo", "acme/x", r"lacks the permission repo\.write for acme"),
        ("unknown", "acme/x", "Invalid credentials|refuses access"),
        ("", "acme/x", "no token"),
    ],
)
def test_a_token_that_may_not_write_there_is_refused(
    log_in: Callable[[str], None], token: str, repo_id: str, words: str
) -> None:
    log_in(token)
    with pytest.raises(AccessDenied, match=words):
        check(repo_id)


@pytest.mark.parametrize(
    ("token", "repo_id"), [("write", "ann/x"), ("write", "acme/x"), ("fine", "acme/x"), ("fine-repo", "acme/only")]
)
def test_a_token_that_may_write_there_is_accepted(log_in: Callable[[str], None], token: str, repo_id: str) -> None:
    log_in(token)
    assert check(repo_id).user == "ann"


def test_a_server_that_is_no_hub_is_said_to_be_none(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.endpoint}/collections")
    with pytest.raises((HubUnreachable, InputError)):
        check("acme/x")


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("repo_id", ["acme/a--b", "acme/a..b", "acme/.hidden", "acme/" + "x" * 97, "acme/x.git"])
def test_a_name_that_the_hub_does_not_allow_is_refused(hub: LocalHub, repo_id: str) -> None:
    with pytest.raises(InputError, match="the Hub allows no such name"):
        check(repo_id)


@pytest.mark.parametrize(
    ("collection", "words"),
    [
        ("no-namespace", "expected namespace/title"),
        ("acme/" + "x" * 60, "title of 60 characters, the Hub takes 59"),
        (f"acme/gone-{'0' * 24}", "Collection not found"),
        ("https://example.com/collections/acme/x", "expected namespace/title"),
    ],
)
def test_a_collection_that_cannot_be_used_is_refused_before_anything_is_published(
    hub: LocalHub, repo_id: str, folder: Path, collection: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        release(folder, repo_id, collection=collection)
    assert not client().repo_exists(repo_id)


def test_a_collection_of_a_namespace_that_the_token_may_not_write_in_is_refused(log_in: Callable[[str], None]) -> None:
    log_in("write")
    with pytest.raises(AccessDenied, match="may not create repositories of strangers"):
        check("acme/x", collection="strangers/Models")


def test_metadata_that_the_hub_does_not_accept_is_refused_before_anything_is_published(
    hub: LocalHub, repo_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.releases.card", lambda tag, **_: "---\nlibrary_name: [1]\n---\n")
    with pytest.raises(InputError, match=r'metadata of the card.*"library_name" must be a string'):
        release(folder, repo_id)
    assert not client().repo_exists(repo_id)


# ---------------------------------------------------------------------------------------------- what is there


def test_a_repository_with_files_that_no_release_made_is_left_alone(hub: LocalHub, repo_id: str, folder: Path) -> None:
    client().create_repo(repo_id)
    client().upload_file(repo_id=repo_id, path_in_repo="model.safetensors", path_or_fileobj=safetensors(w=b"base"))
    with pytest.raises(InputError, match=r"did not make \(model\.safetensors\).*--replace"):
        release(folder, repo_id)
    assert commits(repo_id) == 1
    made = release(folder, repo_id, replace=True)
    assert "model.safetensors" not in {file.name for file in made.files} and commits(repo_id) == 2


def test_a_readme_that_a_person_wrote_is_left_alone(hub: LocalHub, repo_id: str, folder: Path) -> None:
    client().create_repo(repo_id)
    client().upload_file(
        repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=b"---\ntags: [x]\n---\n# Soon here\n"
    )
    with pytest.raises(InputError, match=r"did not make \(README\.md\)"):
        release(folder, repo_id)


def test_a_card_that_a_person_edited_is_left_alone(hub: LocalHub, repo_id: str, folder: Path) -> None:
    made = release(folder, repo_id)
    client().upload_file(repo_id=repo_id, path_in_repo="README.md", path_or_fileobj=card(made.tag).encode() + b"PS\n")
    gate_again(folder, STRICTER)
    with pytest.raises(InputError, match=r"README\.md was edited since the last release"):
        release(folder, repo_id)
    second = release(folder, repo_id, replace=True)
    assert tags(repo_id) == {made.tag: made.commit, second.tag: second.commit}


def test_a_release_of_another_model_is_left_alone(hub: LocalHub, repo_id: str, folder: Path) -> None:
    release(folder, repo_id)
    other = CHECKPOINT.model_copy(update={"model_id": "acme/other"})
    other.save(folder / "fp8pipe" / "checkpoint.json")
    with pytest.raises(InputError, match="is a release of acme/tiny, not of acme/other; name another repository"):
        release(folder, repo_id)
    assert commits(repo_id) == 1
    assert release(folder, repo_id, replace=True).new_commit


# ---------------------------------------------------------------------------------------------- who may see it


@pytest.fixture
def base(hub: LocalHub) -> Iterator[str]:
    """The base model on the Hub, public."""
    client().create_repo(BASE)
    yield BASE
    client().delete_repo(BASE)


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({}, ("public", False)),
        ({"private": True}, ("private", False)),
        ({"gated": "auto"}, ("gated", "auto")),
        ({"gated": "manual"}, ("gated", "manual")),
    ],
)
def test_by_default_a_release_is_seen_by_those_who_see_its_base(
    base: str, repo_id: str, folder: Path, settings: dict[str, Any], seen: tuple[str, Any]
) -> None:
    if settings:
        client().update_repo_settings(base, **settings)
    made = release(folder, repo_id, visibility=None)
    info = client().model_info(repo_id)
    assert (made.visibility, info.gated) == seen
    assert info.private == (made.visibility == "private")
    assert made.visibility_note is None


def test_a_release_of_a_model_that_is_not_on_the_hub_is_private_and_says_so(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    made = release(folder, repo_id, visibility=None)
    assert client().model_info(repo_id).private
    assert made.visibility_note is not None and "say visibility: public" in made.visibility_note


def test_the_base_is_no_bound_for_what_is_asked_for(base: str, repo_id: str, folder: Path) -> None:
    client().update_repo_settings(base, private=True)
    assert release(folder, repo_id, visibility="public").visibility == "public"
    assert not client().model_info(repo_id).private


def test_a_repository_that_its_owner_made_private_stays_so(hub: LocalHub, repo_id: str, folder: Path) -> None:
    release(folder, repo_id)
    client().update_repo_settings(repo_id, private=True)
    gate_again(folder, STRICTER)
    made = release(folder, repo_id, visibility="public")
    assert client().model_info(repo_id).private and made.new_commit
    assert made.visibility == "private" and "stays so" in (made.visibility_note or "")


def test_an_empty_private_repository_that_somebody_made_stays_private(
    hub: LocalHub, repo_id: str, folder: Path
) -> None:
    client().create_repo(repo_id, private=True)
    assert release(folder, repo_id).visibility == "private"
    assert client().model_info(repo_id).private


@pytest.mark.parametrize("wanted", [None, "private", "gated"])
def test_a_release_is_not_put_where_more_people_would_see_it(
    hub: LocalHub, repo_id: str, folder: Path, wanted: str | None
) -> None:
    release(folder, repo_id)
    gate_again(folder, STRICTER)
    with pytest.raises(InputError, match=f"is public, and not {wanted or 'private'}"):
        release(folder, repo_id, visibility=wanted)
    assert commits(repo_id) == 1


def test_a_hub_that_forbids_public_models_is_answered_at_once_and_the_release_stays_private(
    hub: LocalHub, repo_id: str, folder: Path, break_hub: Callable[..., None]
) -> None:
    break_hub(Disruption(path="/settings$", action="status", status=403, times=1))
    steps: list[str] = []
    with pytest.raises(AccessDenied, match=r"does not let it be public.*visibility: private"):
        release(folder, repo_id, progress=lambda event: steps.append(event.note))
    assert steps[-1] == "make public" and client().model_info(repo_id).private
    assert HfApi(endpoint=hub.endpoint, token=False).repo_exists(repo_id) is False
    made = release(folder, repo_id)
    assert not made.new_commit and not client().model_info(repo_id).private


def test_the_names_of_all_recipes_of_the_ladder_are_checked_before_the_first_is_tried(
    hub: LocalHub, repo_id: str, tmp_path: Path
) -> None:
    api, base = client(), f"{repo_id}-base"
    (write_model(tmp_path / "model") / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for name in (base, f"{repo_id}-FP8-dynamic"):
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=tmp_path / "model")
    recipe = load_recipe("fp8-static-kv").model_copy(update={"fallback": ("fp8-dynamic",)})
    spec = ReleaseSpec(model=base, repo_id=f"{repo_id}-FP8-KV")
    with pytest.raises(InputError, match=rf"{repo_id}-FP8-dynamic: holds files that fp8pipe did not make"):
        stages.check_target(ResolvedRelease(spec, recipe, suite(2000), policy(max_attempts=2)))
    assert stages.check_target(ResolvedRelease(spec, recipe, suite(2000), policy(max_attempts=1))) == ()
    assert not api.repo_exists(spec.repo_id), "checking changes nothing"


def test_the_target_is_checked_again_before_the_first_byte(hub: LocalHub, repo_id: str, folder: Path) -> None:
    steps: list[ProgressEvent] = []
    with pytest.raises(InputError):
        release(folder, repo_id, collection="wrong", progress=steps.append)
    assert [event.note for event in steps] == ["check target"]
