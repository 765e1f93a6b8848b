"""Publishing as the tests do it, and what is on the Hub afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp8pipe import stages
from fp8pipe.config import Target
from fp8pipe.hub.client import client
from fp8pipe.progress import Progress, quiet
from fp8pipe.records import Release
from fp8pipe.release.publish import publish


def card(tag: str, *, words: str = "FP8") -> str:
    """A card that names its tag, as every card of a release does."""
    return f"---\nlicense: apache-2.0\n---\n# {words}\n\nvllm serve --revision {tag}\n"


def release(
    folder: Path,
    repo_id: str,
    *,
    note: str = "-0.1 points",
    words: str = "FP8",
    progress: Progress = quiet,
    **target: Any,
) -> Release:
    """Publish with card, collection and note; by default public, and in a collection of the repository's own."""
    known = {"repo_id": repo_id, "collection": f"acme/FP8 {repo_id[-50:]}", "visibility": "public"}
    wanted = Target(**(known | target))
    return publish(folder, wanted, card=lambda tag: card(tag, words=words), note=note, progress=progress)


def release_with_card(folder: Path, repo_id: str, **target: Any) -> Release:
    """Publish with the card of the evidence, as people do."""
    return stages.publish(folder, Target(**({"repo_id": repo_id, "visibility": "public"} | target)))


def commits(repo_id: str) -> int:
    """Number of commits on main after the one that every repository starts with."""
    return len(client().list_repo_commits(repo_id)) - 1


def tags(repo_id: str) -> dict[str, str]:
    """Tag -> commit."""
    return {ref.name: ref.target_commit for ref in client().list_repo_refs(repo_id).tags}


def items(made: Release) -> list[tuple[str, str | None]]:
    """Models and notes of the release's collection."""
    assert made.collection_slug is not None
    return [(item.item_id, item.note) for item in client().get_collection(made.collection_slug).items]
