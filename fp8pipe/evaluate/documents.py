"""How many documents a suite scores, known before any engine starts: an EvalSuite in, DocumentCounts out.

A task whose `documents` the suite states needs no data. The others are loaded in a child process, as the worker loads
them: `python -m fp8pipe.evaluate.documents request.json` writes `documents.json` beside its request.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fp8pipe.config import EvalSuite
from fp8pipe.errors import EngineFailed
from fp8pipe.machine.child import reporting_errors, run_child
from fp8pipe.machine.supervise import take_channel
from fp8pipe.records import Record


class DocumentsRequest(Record):
    """The suite whose documents are counted."""

    suite: EvalSuite
    suite_digest: str


class DocumentCounts(Record):
    """Documents that a suite scores, by task."""

    suite_digest: str
    counts: dict[str, int]
    subtasks: dict[str, int]
    """Number of sub-tasks, for tasks that have several."""


def count_documents(suite: EvalSuite, folder: Path) -> DocumentCounts:
    """Documents that each task of the suite scores, and its sub-tasks. Counts found once are kept in `folder`.

    Raises InputError for a task that lm-eval does not know or whose data are missing, HubUnreachable, EngineFailed.
    """
    request = DocumentsRequest(suite=suite, suite_digest=suite.digest())
    stated = {name: spec.scored for name, spec in suite.tasks.items() if spec.scored is not None}
    # `samples` alone does not say whether they come from sub-tasks, and too few sub-tasks settle nothing.
    if all(spec.documents is not None for spec in suite.tasks.values()):
        subtasks = {name: spec.subtasks for name, spec in suite.tasks.items() if spec.subtasks is not None}
        return DocumentCounts(suite_digest=request.suite_digest, counts=stated, subtasks=subtasks)
    known = DocumentCounts.load_if_present(folder / "documents.json")
    if known is not None and known.suite_digest == request.suite_digest:
        return known
    request.save(folder / "request.json")
    log = folder / "documents.log"
    ending = run_child("fp8pipe.evaluate.documents", folder / "request.json", log=log, in_engine=True, token=True)
    if not ending.succeeded:
        tail = ending.tail()
        raise EngineFailed(f"the tasks of suite {suite.name} could not be loaded:\n{tail}\n(full log: {ending.log})")
    return DocumentCounts.load(folder / "documents.json")


def main() -> None:
    """The child process."""
    path, send = Path(sys.argv[1]), take_channel()
    request = DocumentsRequest.load(path)
    from fp8pipe.evaluate.environment import prepare_process

    prepare_process()
    from fp8pipe.evaluate.tasks import load_tasks

    with reporting_errors(send):
        tasks = load_tasks(request.suite, limit=None)
    counts = {task.name: len(task.picks) for task in tasks}
    subtasks = {task.name: len(task.leaves) for task in tasks if len(task.leaves) > 1}
    found = DocumentCounts(suite_digest=request.suite_digest, counts=counts, subtasks=subtasks)
    found.save(path.with_name("documents.json"))


if __name__ == "__main__":
    main()
