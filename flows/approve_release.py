"""A person's decision on what the gate left inconclusive: the run is suspended until it is answered, then publishes.

It holds no process and no GPU while it waits: the run ends, and its deployment starts it again with the answer.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field

from fp8pipe import stages
from fp8pipe.records import Release
from tasks.gate import approve, question
from tasks.publish import publish

WEEK_S = 7 * 24 * 3600


class Answer(RunInput):
    """What the person says."""

    publish: bool = Field(description="Publish it all the same")
    who: str = Field(min_length=1, description="Your name; it stands in the card")
    reason: str = Field(min_length=1, description="Why; it stands in the card")


@flow(name="approve-release", flow_run_name="approve {repo_id}", persist_result=True)
def approve_release(folder: Path, repo_id: str, collection: str | None = None) -> State[Release | None]:
    """Ask whether the checkpoint in `folder`, which the gate left inconclusive, is to be published; do as answered."""
    shown = question(folder)
    form = Answer.with_initial_data(description=shown)
    answer = suspend_flow_run(wait_for_input=form, timeout=WEEK_S, key="approval")
    said = f"{answer.who}: {answer.reason}"
    if not answer.publish:
        return Completed(name="Declined", message=f"declined by {said}", data=None)

    approve(folder, answer.who, answer.reason)
    release = publish(folder, repo_id, collection)
    stages.released_by_decision(folder, release)
    return Completed(name="Released", message=f"inconclusive, released by decision of {said}", data=release)
