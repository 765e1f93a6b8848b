"""Publishing an accepted checkpoint. Every step checks before it acts, so a retry converges."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact

from fp8pipe import stages
from fp8pipe.records import Release
from tasks.progress import artifact_key, reporter
from tasks.retries import STAGE


@task(
    name="publish",
    task_run_name="publish {repo_id}",
    **STAGE,
)
def publish(folder: Path, repo_id: str, collection: str | None, description: str = "") -> Release:
    """One commit, verified on the Hub, tagged, and added to its collection; `description` is for a new collection."""
    progress = reporter("publish", repo_id)
    release = stages.publish(
        folder, repo_id=repo_id, collection=collection, collection_description=description, progress=progress
    )
    link = f"{release.repo_url}/tree/{release.tag}"
    create_link_artifact(link, link_text=f"{repo_id}@{release.tag}", key=artifact_key("release", repo_id))
    return release
