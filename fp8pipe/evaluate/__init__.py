"""Measure one model once: an EvalRequest in, an EvalReport out, through a supervised child process.

    request_for   the request to measure a checkpoint folder with a suite on this machine
    evaluate      request.json -> worker (vLLM and lm-eval in one process group) -> report.json, all in one folder
    baseline_key  name of the folder in which all recipes of a model find its baseline

Nothing here imports torch, vLLM or lm-eval: a report that exists already is found in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fp8pipe.errors import EngineFailed, SourceChanged
from fp8pipe.evaluate import looks
from fp8pipe.evaluate.looks import GO_ON, STOP
from fp8pipe.evaluate.memory import MAX_RETRIES, shortage, smaller
from fp8pipe.evaluate.request import EvalRequest, baseline_key, request_for
from fp8pipe.evaluate.texts import require_answer
from fp8pipe.machine.child import run_child
from fp8pipe.machine.locks import Held, devices, folder_lock, hold
from fp8pipe.machine.supervise import Ending, Message
from fp8pipe.model.identity import folder_identity
from fp8pipe.progress import Progress, ProgressEvent, quiet
from fp8pipe.records import EvalReport, Retry

__all__ = ["Settles", "baseline_key", "evaluate", "request_for"]

_SHORTAGE_LINES = 400
"""Lines of the log in which to look for a shortage of memory: a worker of the engine reports it, and then its parent
prints a long traceback."""

STALL_S = 1800.0
"""An engine is hung when it neither logs nor reports progress for this long, or reports no progress for four times this
long. Loading and compiling a large model takes less."""


Settles = Callable[[EvalReport, int], bool]
"""Whether the report of a look, counted from 1, settles the matter, so that no further look is measured."""


def evaluate(
    request: EvalRequest,
    folder: Path,
    *,
    settles: Settles | None = None,
    progress: Progress = quiet,
) -> EvalReport:
    """Measure as requested, look by look until `settles` says so, or the looks are used up; returns the last report.
    It is `folder/report.json`; the full log is `folder/worker.log`.

    `settles` is asked once about each look, in order. One engine serves all looks, and waits for that answer between
    two of them. Finished reports of an equal request are used without starting anything. Otherwise the run waits until
    no other uses the device or the folder, and the worker holds them. Tasks that an interrupted run finished,
    and documents of earlier looks, are not scored again; nor are those of a smaller `limit`, unless examples are drawn
    for the prompts. An engine that runs out of memory is started again with smaller batches, then with less context;
    the report lists these retries.

    Raises EngineFailed when vLLM does not start, dies or hangs; InputError for a task or a model that cannot be
    measured as requested, or whose tokenizer or chat template does not work; HubUnreachable when task data cannot be
    downloaded; SourceChanged when a candidate's folder is altered meanwhile.
    """
    run = _Run(request, folder, settles)
    if not run.settled():
        wanted = (folder_lock(folder), devices(request.device, request.parallel.devices))
        work = f"evaluate {request.model_id} as {request.role} in {folder}"
        with hold(wanted, work, stage="evaluate", progress=progress) as held:
            if not run.settled():  # whoever had the folder may have measured the same
                _run_worker(run, held, progress)
        run.settled()
    assert run.report is not None
    return run.report


@dataclass
class _Run:
    """One call of `evaluate`: which looks have been judged."""

    request: EvalRequest
    folder: Path
    settles: Settles | None
    look: int = 1
    """The first look that has not been judged."""
    report: EvalReport | None = None
    """That of the last look, once there is one."""

    def settled(self) -> bool:
        """Judge the looks that have a report; whether nothing more is to be measured."""
        while self.report is None and (found := looks.find(self.folder, self.request.up_to(self.look))) is not None:
            settled = self.settles is not None and self.settles(found, self.look)
            if settled or self.look == len(self.request.looks):
                self.report = found
            self.look += 1
        return self.report is not None


def _run_worker(run: _Run, held: Held, progress: Progress) -> None:
    """Run the worker until it has measured what is wanted; start it again with less when memory runs out."""
    request, folder = run.request, run.folder
    earlier = EvalRequest.load_if_present(folder / "request.json")
    known = earlier is not None and earlier.identity() == request.up_to(len(earlier.looks)).identity()
    if earlier is not None and known and looks.begins_with(earlier.retries, request.retries):
        request = request.model_copy(update={"retries": earlier.retries})  # what did not fit then does not fit now
    while True:
        looks.clear(folder, request)
        ending = _run_once(request, run, held, progress)
        if ending.succeeded:
            _require_unchanged(request, folder)
            return
        cause = shortage(ending.tail(_SHORTAGE_LINES), ending.returncode) if ending.reason == "exited" else None
        if cause is None or len(request.retries) == MAX_RETRIES:
            raise EngineFailed(_explain(request, ending))
        changed = smaller(request.engine | request.reduced, cause, len(request.retries) + 1, Path(request.model))
        request = request.model_copy(update={"retries": (*request.retries, Retry(cause=cause, changed=changed))})
        progress(ProgressEvent("evaluate", 0, None, "requests", f"out of memory; again with {_listed(changed)}"))


def _run_once(request: EvalRequest, run: _Run, held: Held, progress: Progress) -> Ending:
    note, last = "", ProgressEvent("evaluate", 0, None, "requests")

    def on_message(message: Message) -> Message | None:
        nonlocal note, last
        if "look" in message:
            _require_unchanged(request.up_to(message["look"]), run.folder)
            return STOP if run.settled() else GO_ON
        note = message.get("note", f"suite {request.suite.name}")
        last = ProgressEvent("evaluate", message.get("done", 0), message.get("total"), "requests", note)
        progress(last)
        return None

    ending = run_child(
        "fp8pipe.evaluate.worker",
        run.folder / "request.json",
        log=run.folder / "worker.log",
        in_engine=True,
        on_message=on_message,
        on_tick=lambda: progress(last),
        stall_s=STALL_S,
        held=held,
        token=True,  # for datasets; the worker forgets it before the model's own code can run
    )
    if ending.reason == "exited":
        require_answer(request.model, ending, note)
    return ending


def _require_unchanged(request: EvalRequest, folder: Path) -> None:
    """Discard the report of `request` if its model's folder is no longer the one that was to be measured."""
    if request.role == "candidate" and folder_identity(Path(request.model)) != request.folder_identity:
        looks.discard(folder, request)
        raise SourceChanged(f"{request.model}: altered while it was measured; the measurement is void, run it again")


_CAUSE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|NotFound|Fault)\b.*", re.MULTILINE)


def _explain(request: EvalRequest, ending: Ending) -> str:
    """What happened to the worker, the most likely cause, the end of its log and where the rest is."""
    tail = ending.tail()
    if ending.reason == "stalled":
        what = f"hung, with no sign of life, and was ended after {ending.seconds:.0f} s"
    elif ending.returncode == 137:
        what = "killed (signal 9): most likely the machine ran out of memory; lower max_model_len in the suite's engine"
    else:
        causes = _CAUSE.findall(tail)
        what = f"vLLM or lm-eval failed (exit {ending.returncode}): {causes[-1] if causes else 'see the log'}"
    if request.retries:
        what += f" (retried {len(request.retries)} times for lack of memory, at last with {_listed(request.reduced)})"
    return (
        f"evaluating {request.model} with suite {request.suite.name}: {what}\n{_indent(tail)}\n(full log: {ending.log})"
    )


def _listed(changed: Mapping[str, int | float]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def _indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())
