"""A person's decision on a result that the gate left inconclusive: the run waits for it, then publishes or does not.

While it waits the run is suspended: it holds no process and no GPU. Its deployment starts it again with the answer.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field

import tasks
from fp8pipe.config import Target
from fp8pipe.records import Release
from fp8pipe.release.outcome import released_by_decision
from tasks.suspend import answer_to

WEEK_S = 7 * 24 * 3600


class Answer(RunInput):
    """The person's answer."""

    publish: bool = Field(description="Publish it nevertheless")
    who: str = Field(min_length=1, description="Your name; the card shows it")
    reason: str = Field(min_length=1, description="Your reason; the card shows it")


@flow(name="approve-release", flow_run_name="approve {target.repo_id}", persist_result=True)
def approve_release(folder: Path, target: Target) -> State[Release | None]:
    """Ask a person whether to publish the checkpoint in `folder`, which the gate left inconclusive; act accordingly."""
    form = Answer.with_initial_data(description=tasks.question(folder))
    answer = answer_to(form, key="approval", timeout_s=WEEK_S)
    by = f"{answer.who}: {answer.reason}"
    if not answer.publish:
        return Completed(name="Declined", message=f"declined by {by}", data=None)

    tasks.approve(folder, answer.who, answer.reason)
    release = tasks.publish(folder, target)
    released_by_decision(folder, release)
    return Completed(name="Released", message=f"inconclusive, released by decision of {by}", data=release)
