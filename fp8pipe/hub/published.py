"""What main of a repository shows of the releases of fp8pipe, read from its evidence."""

from __future__ import annotations

from dataclasses import dataclass

from fp8pipe.hub.client import client
from fp8pipe.hub.contents import json_at, read_at
from fp8pipe.hub.target import MARK
from fp8pipe.hub.yanked import manifest_tag, yanked_at
from fp8pipe.records import RECORD_DIR, RECORD_FILES, Yank


@dataclass(frozen=True, slots=True)
class Published:
    """The release that main of a repository shows."""

    repo_id: str
    tag: str
    model_id: str
    recipe: str
    source_commit: str
    fingerprint: str
    gate: bytes
    """Its decision, as published; empty if there is none."""
    yank: Yank | None
    """How it was withdrawn, if it was."""


def published_at(repo_id: str) -> Published | None:
    """The release that main shows; None if there is no repository, or no finished release of fp8pipe in it.

    Call it inside `translated`. Raises InputError if somebody else wrote its yanked.json.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    api = client()
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None
    repo_id, commit = info.id, info.sha  # the Hub's own spelling: it takes names that differ in case as one
    assert commit is not None
    checkpoint = json_at(api, repo_id, commit, MARK)
    tag = manifest_tag(api, repo_id, commit) if checkpoint else None
    if tag is None or tag not in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
        return None
    return Published(
        repo_id=repo_id,
        tag=tag,
        model_id=str(checkpoint.get("model_id", "")),
        recipe=str(checkpoint.get("recipe", "")),
        source_commit=str(checkpoint.get("source_commit", "")),
        fingerprint=str(checkpoint.get("fingerprint", "")),
        gate=read_at(api, repo_id, commit, f"{RECORD_DIR}/{RECORD_FILES['gate']}") or b"",
        yank=yanked_at(api, repo_id, commit).of(tag),
    )
