"""Withdrawing a release. Every step checks before it acts: retries converge."""

from __future__ import annotations

from prefect import task

from fp8pipe.records import Withdrawal
from fp8pipe.release.yank import yank as withdraw
from fp8pipe.ui import sheets
from tasks.progress import artifact_key, keep_page, reporter
from tasks.retries import STAGE


@task(name="yank", task_run_name="yank {release}", **STAGE)
def yank(release: str, reason: str) -> Withdrawal:
    """A banner in the card, no collection item, the tag as it was; with a page that says so."""
    reporter("yank", release)
    made = withdraw(release, reason)
    key = artifact_key("yank", made.repo_id)
    keep_page(sheets.markdown(sheets.withdrawal_sheet(made)), key=key, description=f"Yanked: {made.repo_id}")
    return made
