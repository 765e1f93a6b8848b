"""How many documents a suite scores, before any engine starts: suite in, DocumentCounts out.

A task whose `documents` the suite names needs no look at its data. For the others the tasks are loaded as
the worker loads them, in a child process: `python -m fp8pipe.evaluate.documents request.json`, counts in
`documents.json` beside.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fp8pipe import errors
from fp8pipe.config import EvalSuite
from fp8pipe.errors import EngineFailed, Fp8PipeError
from fp8pipe.machine.supervise import Message, supervise, take_channel
from fp8pipe.records import Record


class DocumentsRequest(Record):
    """The suite to count."""

    suite: EvalSuite
    suite_digest: str


class DocumentCounts(Record):
    """Documents that a suite scores, by task."""

    suite_digest: str
    counts: dict[str, int]
    subtasks: dict[str, int]
    """Sub-tasks of each task that has several."""


def count_documents(suite: EvalSuite, folder: Path, *, python: str | None = None) -> DocumentCounts:
    """Documents scored per task of the suite, and its sub-tasks; counts found once are kept in `folder`.

    InputError for a task that lm-eval does not know or whose data is not there, HubUnreachable.
    """
    request = DocumentsRequest(suite=suite, suite_digest=suite.digest())
    named = {name: spec.scored for name, spec in suite.tasks.items() if spec.scored is not None}
    # `samples` alone does not tell whether they come from sub-tasks, of which there can be too few to settle anything.
    if all(spec.documents is not None for spec in suite.tasks.values()):
        subtasks = {name: spec.subtasks for name, spec in suite.tasks.items() if spec.subtasks is not None}
        return DocumentCounts(suite_digest=request.suite_digest, counts=named, subtasks=subtasks)
    known = DocumentCounts.load_if_present(folder / "documents.json")
    if known is not None and known.suite_digest == request.suite_digest:
        return known
    request.save(folder / "request.json")
    told: list[Message] = []
    command = [python or sys.executable, "-m", "fp8pipe.evaluate.documents", str((folder / "request.json").resolve())]
    ending = supervise(command, log=folder / "documents.log", on_message=told.append)
    if told:
        raise getattr(errors, told[-1]["error"])(told[-1]["message"])
    if not ending.succeeded:
        tail = ending.tail()
        raise EngineFailed(f"the tasks of suite {suite.name} could not be loaded:\n{tail}\n(log: {ending.log})")
    return DocumentCounts.load(folder / "documents.json")


def main() -> None:
    """The child process."""
    path, tell = Path(sys.argv[1]), take_channel()
    request = DocumentsRequest.load(path)
    from fp8pipe.evaluate.environment import prepare_process

    prepare_process()
    from fp8pipe.evaluate.tasks import load_subjects

    try:
        subjects = load_subjects(request.suite, limit=None)
    except Fp8PipeError as error:
        tell({"error": type(error).__name__, "message": str(error)})
        raise
    counts = {subject.name: len(subject.picks) for subject in subjects}
    subtasks = {subject.name: len(subject.leaves) for subject in subjects if len(subject.leaves) > 1}
    found = DocumentCounts(suite_digest=request.suite_digest, counts=counts, subtasks=subtasks)
    found.save(path.with_name("documents.json"))


if __name__ == "__main__":
    main()
