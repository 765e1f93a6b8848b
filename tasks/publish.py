"""Checks where a release would be published, and publishes it. Every step checks before it acts: retries converge."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact
from prefect.logging import get_run_logger

from fp8pipe import stages
from fp8pipe.config import ResolvedRelease, Target
from fp8pipe.records import Release
from tasks.progress import artifact_key, reporter
from tasks.retries import STAGE


@task(name="check target", task_run_name="check target {job.spec.repo_id}", **STAGE)
def check_target(job: ResolvedRelease) -> None:
    """Refuse, before the first second of a GPU, what the Hub or a licence would refuse after the last one."""
    reporter("check target", job.spec.repo_id)
    for note in stages.check_target(job):
        get_run_logger().warning("%s", note)


@task(name="publish", task_run_name="publish {target.repo_id}", **STAGE)
def publish(folder: Path, target: Target) -> Release:
    """One commit, verified on the Hub, tagged, shown to those who may see it, and added to its collection."""
    release = stages.publish(folder, target, progress=reporter("publish", target.repo_id))
    link = f"{release.repo_url}/tree/{release.tag}"
    key = artifact_key("release", target.repo_id)
    create_link_artifact(link, link_text=f"{target.repo_id}@{release.tag}", key=key)
    return release
