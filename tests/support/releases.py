"""Publishing as the tests do it, and what is on the Hub afterwards."""

from __future__ import annotations

from pathlib import Path

from fp8pipe.hub.client import client
from fp8pipe.progress import Progress, quiet
from fp8pipe.records import Release
from fp8pipe.release.publish import publish

CARD = "---\nlicense: apache-2.0\n---\n# FP8\n"


def release(folder: Path, repo_id: str, *, note: str = "-0.1 points", progress: Progress = quiet) -> Release:
    """Publish with card, collection and note; the collection is the repository's own."""
    collection = f"acme/FP8 {repo_id[-50:]}"
    return publish(folder, repo_id=repo_id, card=CARD, note=note, collection=collection, progress=progress)


def commits(repo_id: str) -> int:
    """Number of commits on main after the one that every repository starts with."""
    return len(client().list_repo_commits(repo_id)) - 1


def items(made: Release) -> list[tuple[str, str | None]]:
    """Models and notes of the release's collection."""
    assert made.collection_slug is not None
    return [(item.item_id, item.note) for item in client().get_collection(made.collection_slug).items]
