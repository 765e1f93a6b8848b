"""The reports of one measurement on disk, one for each look.

report.json, request.json    the latest look, and the request that it answers
looks/                       the reports of the looks before the last, which stay valid once the next begins
"""

from __future__ import annotations

from pathlib import Path

from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.machine.supervise import Message
from fp8pipe.records import EvalReport, Retry

GO_ON: Message = {"go_on": True}
STOP: Message = {"go_on": False}
"""The parent's answers to a worker that has measured one look: whether another is wanted."""


def find(folder: Path, request: EvalRequest) -> EvalReport | None:
    """The report of an equal request, up to the same look, that finished here."""
    if request.share < 1:
        report = EvalReport.load_if_present(_path(folder, request))
    else:
        earlier = EvalRequest.load_if_present(folder / "request.json")
        if earlier is None or earlier.identity() != request.identity():
            return None
        report = EvalReport.load_if_present(folder / "report.json")
    return report if report is not None and begins_with(report.retries, request.retries) else None


def keep(folder: Path, request: EvalRequest, report: EvalReport) -> None:
    """Save the report of `request`, which ends at the report's look."""
    if request.share < 1:
        report.save(_path(folder, request))
    clear(folder, request)
    report.save(folder / "report.json")


def clear(folder: Path, request: EvalRequest) -> None:
    """Put `request` into the folder. The old report goes before it comes, so that the two always belong together."""
    (folder / "report.json").unlink(missing_ok=True)
    request.save(folder / "request.json")


def discard(folder: Path, request: EvalRequest) -> None:
    """Remove the report of `request`."""
    for path in (folder / "report.json", _path(folder, request)):
        path.unlink(missing_ok=True)


def begins_with(retries: tuple[Retry, ...], given: tuple[Retry, ...]) -> bool:
    """Whether an engine had at least the reductions that were `given` to it."""
    return retries[: len(given)] == given


def _path(folder: Path, request: EvalRequest) -> Path:
    return folder / "looks" / f"{request.share:g}-{request.identity()[:16]}.json"
