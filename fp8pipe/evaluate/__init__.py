"""Measures one model once: a request in, an EvalReport out, in a supervised child process that ends with it.

    evaluate     request.json -> worker (vLLM and lm-eval, one process group) -> report.json, both in one folder
    baseline_key name of the folder in which all recipes of a model find its baseline

Nothing here imports torch, vLLM or lm-eval: a report that is there already is found in milliseconds.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fp8pipe import errors
from fp8pipe.config import EvalSuite
from fp8pipe.errors import EngineFailed, Fp8PipeError, ModelNotFound, SourceChanged
from fp8pipe.evaluate.memory import MAX_RETRIES, shortage, smaller
from fp8pipe.evaluate.request import EvalRequest, baseline_key, engine_arguments, setting
from fp8pipe.machine.supervise import Ending, Message, supervise
from fp8pipe.model.identity import folder_identity
from fp8pipe.progress import Progress, ProgressEvent, quiet
from fp8pipe.records import EvalReport, Retry

__all__ = ["baseline_key", "evaluate"]

_SHORTAGE_LINES = 400
"""How far back in the log memory may have run out: a worker of the engine says so, then its parent's long traceback."""

STALL_S = 1800.0
"""Neither progress nor a line in the log for this long is a hang; nor is four times this long without progress.
Loading and compiling a large model stays below."""


def evaluate(
    model: Path,
    suite: EvalSuite,
    folder: Path,
    *,
    role: Literal["baseline", "candidate"],
    model_id: str,
    fingerprint: str,
    kv_cache_dtype: str = "auto",
    online: str | None = None,
    limit: int | None = None,
    looks: tuple[float, ...] = (1.0,),
    retries: tuple[Retry, ...] = (),
    python: str | None = None,
    timeout_s: float | None = None,
    stall_s: float = STALL_S,
    progress: Progress = quiet,
) -> EvalReport:
    """Measure `model` with `suite`; the report is `folder/report.json`, the full log `folder/worker.log`.

    A finished report of the same request (fingerprint, suite, engine arguments, versions, device class) is returned
    without starting anything. `online` quantizes while loading (vLLM's `quantization`), `limit` scores the first N
    documents of each task's permutation; `looks` are the shares of them at which a gate looks, the last one now.
    `python` is an interpreter that has vLLM, lm-eval and fp8pipe installed. Tasks that an interrupted run finished, and
    documents of earlier looks, are not scored again; nor are those of a smaller `limit`, unless examples are drawn for
    them. An engine that runs out of memory is started anew with smaller batches, then with less context; the report
    says so. `retries` are those that the other side needed: this side begins with the same engine.

    EngineFailed when vLLM does not start, dies, hangs or takes longer than `timeout_s`; InputError for a task or a
    model that cannot be measured as asked; HubUnreachable when task data cannot be fetched; SourceChanged when the
    folder of a candidate is altered meanwhile.
    """
    if not (model / "config.json").is_file():
        raise ModelNotFound(f"{model}: no config.json; expected the folder of a checkpoint")
    where = setting(python)
    request = EvalRequest(
        role=role,
        model_id=model_id,
        model=str(model.resolve()),
        fingerprint=fingerprint,
        folder_identity=folder_identity(model) if role == "candidate" else None,
        suite=suite,
        suite_digest=suite.digest(),
        limit=limit,
        looks=looks,
        retries=retries,
        engine=engine_arguments(suite, kv_cache_dtype=kv_cache_dtype, online=online, on_cpu=where.on_cpu),
        versions=where.versions,
        device_class=where.device_class,
    )
    finished = _finished(folder, request)
    if finished is not None:
        return finished
    report = _run_worker(request, folder, python or sys.executable, timeout_s, stall_s, progress)
    if role == "candidate" and folder_identity(model) != request.folder_identity:
        (folder / "report.json").unlink()
        raise SourceChanged(f"{model}: altered while it was measured; the measurement is void, run it again")
    if request.share < 1:
        report.save(_look_path(folder, request))
    return report


def _finished(folder: Path, request: EvalRequest) -> EvalReport | None:
    """The report of an equal request that ran to its end here; that of a look also after the next has begun."""
    if request.share < 1:
        report = EvalReport.load_if_present(_look_path(folder, request))
    else:
        earlier = EvalRequest.load_if_present(folder / "request.json")
        if earlier is None or earlier.identity() != request.identity():
            return None
        report = EvalReport.load_if_present(folder / "report.json")
    return report if report is not None and _begins_with(report.retries, request.retries) else None


def _begins_with(retries: tuple[Retry, ...], given: tuple[Retry, ...]) -> bool:
    return retries[: len(given)] == given


def _look_path(folder: Path, request: EvalRequest) -> Path:
    return folder / "looks" / f"{request.share:g}-{request.identity()[:16]}.json"


def _run_worker(
    request: EvalRequest, folder: Path, python: str, timeout_s: float | None, stall_s: float, progress: Progress
) -> EvalReport:
    """Run the worker to its report; started anew with less when memory runs out."""
    earlier = EvalRequest.load_if_present(folder / "request.json")
    known = earlier is not None and earlier.identity() == request.identity()
    if earlier is not None and known and _begins_with(earlier.retries, request.retries):
        request = request.model_copy(update={"retries": earlier.retries})  # what did not fit then does not fit now
    while True:
        # The old report goes before the new request comes: the two in the folder never belong to different runs.
        (folder / "report.json").unlink(missing_ok=True)
        request.save(folder / "request.json")
        ending = _run_once(request, folder, python, timeout_s, stall_s, progress)
        if ending.succeeded:
            return EvalReport.load(folder / "report.json")
        cause = shortage(ending.tail(_SHORTAGE_LINES), ending.returncode) if ending.reason == "exited" else None
        if cause is None or len(request.retries) == MAX_RETRIES:
            raise EngineFailed(_explain(request, ending))
        changed = smaller(request.engine | request.reduced, cause, len(request.retries) + 1, Path(request.model))
        request = request.model_copy(update={"retries": (*request.retries, Retry(cause=cause, changed=changed))})
        progress(ProgressEvent("evaluate", 0, None, "requests", f"out of memory; again with {_listed(changed)}"))


def _listed(changed: Mapping[str, int | float]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def _run_once(
    request: EvalRequest, folder: Path, python: str, timeout_s: float | None, stall_s: float, progress: Progress
) -> Ending:
    """One worker; what it tells of its own errors is raised as the class it was."""
    told: list[Message] = []

    def on_message(message: Message) -> None:
        if "error" in message:
            told.append(message)
        else:
            progress(_event(message, request.suite.name))

    command = [python, "-m", "fp8pipe.evaluate.worker", str((folder / "request.json").resolve())]
    ending = supervise(command, log=folder / "worker.log", on_message=on_message, timeout_s=timeout_s, stall_s=stall_s)
    if told:
        raise _told_error(told[-1], ending)
    return ending


def _event(message: Message, suite: str) -> ProgressEvent:
    note = message.get("note", f"suite {suite}")
    return ProgressEvent("evaluate", message.get("done", 0), message.get("total"), "requests", note)


def _told_error(message: Message, ending: Ending) -> Fp8PipeError:
    """The error that the worker met, as the class it was."""
    found = getattr(errors, message["error"], None)
    kind = found if isinstance(found, type) and issubclass(found, Fp8PipeError) else Fp8PipeError
    return kind(f"{message['message']} (log: {ending.log})")


_CAUSE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|NotFound|Fault)\b.*", re.MULTILINE)


def _explain(request: EvalRequest, ending: Ending) -> str:
    """What happened to the worker, the most likely cause, the end of its log and where the rest is."""
    tail = ending.tail()
    if ending.reason == "timeout":
        what = f"not finished after {ending.seconds:.0f} s and ended; give it more time, or fewer samples"
    elif ending.reason == "stalled":
        what = f"no sign of life any more, ended after {ending.seconds:.0f} s"
    elif ending.returncode == 137:
        what = "killed (signal 9): most likely the machine ran out of memory; lower max_model_len in the suite's engine"
    else:
        causes = _CAUSE.findall(tail)
        what = f"vLLM or lm-eval failed (exit {ending.returncode}): {causes[-1] if causes else 'see the log'}"
    if request.retries:
        what += f" (started anew for want of memory: {len(request.retries)}, the last with {_listed(request.reduced)})"
    return (
        f"evaluating {request.model} with suite {request.suite.name}: {what}\n{_indent(tail)}\n(full log: {ending.log})"
    )


def _indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())
