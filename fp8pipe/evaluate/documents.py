"""How many documents a suite scores, before any engine starts: suite in, task -> count out.

A task whose `samples` the suite names needs no look at its data. For the others the tasks are loaded as the worker
loads them, in a child process: `python -m fp8pipe.evaluate.documents request.json`, counts in `documents.json` beside.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fp8pipe import errors
from fp8pipe.config import EvalSuite
from fp8pipe.errors import EngineFailed, Fp8PipeError
from fp8pipe.evaluate.supervise import Message, supervise, take_channel
from fp8pipe.records import Record


class DocumentsRequest(Record):
    """The suite to count."""

    suite: EvalSuite
    suite_digest: str


class DocumentCounts(Record):
    """Documents that a suite scores, by task."""

    suite_digest: str
    counts: dict[str, int]


def count_documents(suite: EvalSuite, folder: Path, *, python: str | None = None) -> dict[str, int]:
    """Documents scored per task of the suite; counts found once are kept in `folder`.

    InputError for a task that lm-eval does not know or whose data is not there, HubUnreachable.
    """
    if all(spec.samples is not None for spec in suite.tasks.values()):
        return {name: spec.samples or 0 for name, spec in suite.tasks.items()}
    request = DocumentsRequest(suite=suite, suite_digest=suite.digest())
    known = DocumentCounts.load_if_present(folder / "documents.json")
    if known is not None and known.suite_digest == request.suite_digest:
        return known.counts
    request.save(folder / "request.json")
    told: list[Message] = []
    command = [python or sys.executable, "-m", "fp8pipe.evaluate.documents", str((folder / "request.json").resolve())]
    ending = supervise(command, log=folder / "documents.log", on_message=told.append)
    if told:
        raise getattr(errors, told[-1]["error"])(told[-1]["message"])
    if not ending.succeeded:
        tail = ending.tail()
        raise EngineFailed(f"the tasks of suite {suite.name} could not be loaded:\n{tail}\n(log: {ending.log})")
    return DocumentCounts.load(folder / "documents.json").counts


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
    DocumentCounts(suite_digest=request.suite_digest, counts=counts).save(path.with_name("documents.json"))


if __name__ == "__main__":
    main()
