"""A published release is withdrawn: its card says so, its collections no longer list it, its tag stays."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

import tasks
from fp8pipe.records import Withdrawal


@flow(name="yank-release", flow_run_name="yank {release}")
def yank_release(release: str, reason: str) -> State[Withdrawal]:
    """Withdraw `release`, a repository (its newest release) or `repository@tag`, for a reason that its card shows."""
    made = tasks.yank(release, reason)
    return Completed(name="Yanked", message=f"{made.repo_id}@{made.yank.tag}: {made.yank.reason}", data=made)
