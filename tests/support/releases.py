"""Publishing as the tests do it."""

from __future__ import annotations

from pathlib import Path

from fp8pipe.records import Release
from fp8pipe.release.publish import publish

CARD = "---\nlicense: apache-2.0\n---\n# FP8\n"


def release(folder: Path, repo_id: str, *, note: str = "-0.1 points", **more: object) -> Release:
    """Publish with card, collection and note; the collection is the repository's own."""
    title = f"FP8 {repo_id[-50:]}"
    return publish(folder, repo_id=repo_id, card=CARD, collection=f"acme/{title}", note=note, **more)  # type: ignore[arg-type]  # tests pass any option
