"""The stages as people and tasks call them: records in, a room's work, a record out beside what it describes.

A stage that finds its record, made from the same inputs, returns it and does nothing else. The commands and the Prefect
tasks are both thin wrappers of these functions, so that a release made by hand is the release that the flow makes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fp8pipe.config import EvalSuite, GatePolicy, Recipe, ResolvedRelease
from fp8pipe.errors import InputError, SourceChanged
from fp8pipe.files import write_atomically
from fp8pipe.progress import Overlap, Progress, quiet
from fp8pipe.records import (
    RECORD_DIR,
    Approval,
    Checkpoint,
    EarlierAttempt,
    EvalReport,
    GateDecision,
    Outcome,
    Release,
    Snapshot,
    ValidationReport,
)
from fp8pipe.records.paths import evidence
from fp8pipe.release.workspace import Workspace

if TYPE_CHECKING:
    from fp8pipe.convert import Conversion, Method
    from fp8pipe.gate.evaluation_plan import EvalPlan
    from fp8pipe.quantize.plan import Plan
    from fp8pipe.records.calibration import Calibration
    from fp8pipe.validate.findings import Depth


# ------------------------------------------------------------------------------------------ source, plan


def pin(model: str) -> Snapshot:
    """The model at one commit, nothing downloaded."""
    from fp8pipe.hub.source import resolve

    return resolve(model)


def fetch(snapshot: Snapshot, *, trust_remote_code: bool = False, progress: Progress = quiet) -> Snapshot:
    """The same snapshot with its files on this machine; its own Python code only when that is trusted."""
    from fp8pipe.hub.download import download

    return download(snapshot, trust_remote_code=trust_remote_code, progress=progress)


def plan_snapshot(
    snapshot: Snapshot,
    recipe: Recipe,
    *,
    trust_remote_code: bool = False,
    keep: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Plan:
    """What would become of every tensor, from headers alone (HTTP ranges when the snapshot is on the Hub).

    keep: tensors that a calibration keeps unquantized -> why. meanwhile: run beside the search for an architecture
    that is not on record."""
    from fp8pipe.hub.headers import read_headers
    from fp8pipe.oracle.transformers import inspect
    from fp8pipe.quantize.plan import make_plan

    headers = read_headers(snapshot)
    architecture = inspect(snapshot, headers=headers, trust_remote_code=trust_remote_code, meanwhile=meanwhile)
    return make_plan(snapshot, headers, recipe, architecture, keep=keep)


# ------------------------------------------------------------------------------------------ calibrate, quantize


def calibrate_snapshot(
    snapshot: Snapshot, plan: Plan, recipe: Recipe, workspace: Workspace, *, device: str, progress: Progress = quiet
) -> Calibration:
    """Ranges for this recipe, shared by every recipe that needs the same; asked for only when a recipe needs them."""
    from fp8pipe.calibrate import calibrate, calibration_key

    key = calibration_key(snapshot, recipe, device=device)
    return calibrate(snapshot, plan, recipe, workspace.calibration(key), device=device, progress=progress)


def quantize_snapshot(
    snapshot: Snapshot,
    plan: Plan,
    folder: Path,
    *,
    calibration: Calibration | None,
    device: str = "cpu",
    progress: Progress = quiet,
) -> tuple[Checkpoint, Snapshot]:
    """The checkpoint in `folder`, with the records it was made from, and the snapshot on this machine.

    A snapshot that is still on the Hub is downloaded meanwhile: a shard is quantized as soon as it has arrived.
    `device`: cpu, auto (the CPU too), cuda or cuda:<n>; the bytes are the same."""
    from fp8pipe.hub.download import download_iter, local_snapshot
    from fp8pipe.quantize import device_for, quantize

    on, trusted = device_for(device), plan.trust_remote_code
    if plan.settings.keep_bf16 is not None and calibration is not None:
        plan = plan_snapshot(snapshot, plan.settings, trust_remote_code=trusted, keep=calibration.kept)
    if snapshot.root is not None:
        checkpoint = quantize(snapshot, plan, folder, calibration=calibration, device=on, progress=progress)
    else:
        both = Overlap(progress, "quantize")
        arriving = download_iter(snapshot, trust_remote_code=trusted, progress=both.earlier)
        here = local_snapshot(snapshot, trust_remote_code=trusted)
        checkpoint = quantize(
            here, plan, folder, calibration=calibration, arriving=arriving, device=on, progress=both.later
        )
    snapshot = fetch(
        snapshot, trust_remote_code=trusted
    )  # there already, unless the checkpoint was and the cache was not
    snapshot.model_copy(update={"root": None}).save(evidence(folder, "source"))
    return checkpoint, snapshot


def quantize_model(
    model: str,
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> Checkpoint:
    """Everything from a model's name to a checkpoint folder."""
    from fp8pipe.quantize import device_for, preload

    device_for(device)  # an unknown one is refused before anything is asked of the Hub
    snapshot = pin(model)
    plan = plan_snapshot(snapshot, recipe, trust_remote_code=trust_remote_code, meanwhile=preload)
    calibration = None
    if recipe.needs_calibration:
        snapshot = fetch(snapshot, trust_remote_code=trust_remote_code, progress=progress)
        workspace = Workspace(folder.parent / f".{folder.name}.work")
        calibration = calibrate_snapshot(snapshot, plan, recipe, workspace, device=device, progress=progress)
    return quantize_snapshot(snapshot, plan, folder, calibration=calibration, device=device, progress=progress)[0]


def show_sensitivity(folder: Path) -> tuple[Calibration, Path | None]:
    """What FP8 costs each Linear of a calibrated checkpoint, and its plot (PNG, with the SVG beside it), drawn anew."""
    from fp8pipe.records.calibration import Calibration
    from fp8pipe.release.plots import write_sensitivity_plot

    path = evidence(folder, "calibration")
    if not path.is_file():
        raise InputError(f"{path}: no such record; the recipe needed no calibration, or {folder} is no checkpoint")
    calibration = Calibration.load(path)
    return calibration, write_sensitivity_plot(calibration, folder / RECORD_DIR / "plots")


# ------------------------------------------------------------------------------------------ validate


def validate_checkpoint(folder: Path, *, source: Snapshot | None, progress: Progress = quiet) -> ValidationReport:
    """The report on `folder` as it is now; an earlier report on the same state is returned as it is."""
    from fp8pipe.model.identity import folder_identity
    from fp8pipe.validate import validate

    path = evidence(folder, "validation")
    depth = "fidelity" if source is not None else "values"
    known = ValidationReport.load_if_present(path)
    if known is not None and known.folder_identity == folder_identity(folder) and depth in (known.depth, "values"):
        return known
    report = validate(folder, source=source, progress=progress)
    if Checkpoint.load_if_present(evidence(folder, "checkpoint")) is not None:
        report.save(path)
    return report


def validate_model(
    model: str,
    *,
    source: str | None = None,
    depth: Depth | None = None,
    oracles: bool = False,
    progress: Progress = quiet,
) -> ValidationReport:
    """Validate by hand: a folder, or any repository of the Hub, from its headers alone unless `depth` asks for more.

    What is deeper needs a download, which a repository whose files are already known to be broken is spared: then the
    report's own depth stays headers.
    """
    from fp8pipe.validate import UNREADABLE, validate

    theirs = pin(source) if source else None
    folder = Path(model).expanduser()
    if folder.is_dir() or model.startswith(("/", ".", "~")):
        if theirs is not None and depth in (None, "fidelity"):
            theirs = fetch(theirs, progress=progress)
        report = validate(folder, source=theirs, depth=depth, oracles=oracles, progress=progress)
        if Checkpoint.load_if_present(evidence(folder, "checkpoint")) is not None:
            report.save(evidence(folder, "validation"))
        return report
    ours = pin(model)
    report = validate(ours, source=theirs, depth="headers", oracles=oracles, progress=progress)
    if depth in (None, "headers") or any(finding.check in UNREADABLE for finding in report.errors):
        return report
    ours = ours.model_copy(update={"root": fetch(ours, progress=progress).root})
    theirs = fetch(theirs, progress=progress) if theirs is not None and depth == "fidelity" else theirs
    return validate(ours, source=theirs, depth=depth, oracles=oracles, progress=progress)


# ------------------------------------------------------------------------------------------ convert


def convert_model(
    model: str, output: Path | None, *, to: Method | None, progress: Progress = quiet
) -> tuple[Conversion, Path]:
    """Another spelling of an FP8 checkpoint, or (`to` None) its legacy names mended, and the folder it is in.

    `output` defaults to the source's name and what was done, beside a source folder or here. A conversion without
    changes wrote nothing."""
    from fp8pipe.convert import convert, plan_conversion
    from fp8pipe.hub.headers import read_headers

    snapshot = pin(model)
    snapshot = fetch(snapshot, trust_remote_code=snapshot.is_local, progress=progress)
    plan = plan_conversion(snapshot, read_headers(snapshot), to=to)
    beside = snapshot.path.parent if snapshot.is_local else Path()
    folder = output or beside / f"{snapshot.model_id.rpartition('/')[2]}-{to or 'migrated'}"
    return convert(plan, folder, progress=progress), folder


# ------------------------------------------------------------------------------------------ evaluate


def plan_eval(policy: GatePolicy, suite: EvalSuite, folder: Path, *, attempts: int = 1) -> EvalPlan:
    """What the suite's samples can settle, before any of them is scored; `folder` keeps the count of documents."""
    from fp8pipe.evaluate.documents import count_documents
    from fp8pipe.gate.evaluation_plan import plan_evaluation

    gated = suite.model_copy(update={"tasks": {name: suite.tasks[name] for name in policy.gated_tasks}})
    found = count_documents(gated, folder)
    return plan_evaluation(policy, suite.name, found.counts, subtasks=found.subtasks, attempts=attempts)


def evaluate_baseline(
    snapshot: Snapshot,
    suite: EvalSuite,
    workspace: Workspace,
    *,
    looks: tuple[float, ...] = (1.0,),
    look: int = 1,
    progress: Progress = quiet,
) -> EvalReport:
    """The source model's own measurement up to this look, made once for all recipes."""
    from fp8pipe.evaluate import baseline_key, evaluate

    folder = workspace.baseline(baseline_key(snapshot.commit, suite, looks=looks))
    return evaluate(
        snapshot.path,
        suite,
        folder,
        role="baseline",
        model_id=snapshot.model_id,
        fingerprint=snapshot.commit,
        looks=looks[:look],
        progress=progress,
    )


def evaluate_candidate(
    checkpoint_folder: Path,
    suite: EvalSuite,
    folder: Path,
    *,
    baseline: EvalReport | None = None,
    looks: tuple[float, ...] = (1.0,),
    look: int = 1,
    progress: Progress = quiet,
) -> EvalReport:
    """The checkpoint's measurement up to this look, served as its recipe means it to be, and with what the engine of
    its `baseline` had to do without: FP8 may fit where BF16 did not, and then the two could not be compared."""
    from fp8pipe.evaluate import evaluate
    from fp8pipe.quantize.plan import Plan

    checkpoint = Checkpoint.load(evidence(checkpoint_folder, "checkpoint"))
    recipe = Plan.load(evidence(checkpoint_folder, "plan")).settings
    return evaluate(
        checkpoint_folder,
        suite,
        folder,
        role="candidate",
        model_id=checkpoint.model_id,
        fingerprint=checkpoint.fingerprint,
        kv_cache_dtype="fp8" if recipe.kv_cache is not None else "auto",
        looks=looks[:look],
        retries=baseline.retries if baseline is not None else (),
        progress=progress,
    )


def evaluate_model(
    model: str,
    suite: EvalSuite,
    folder: Path,
    *,
    kv_cache_dtype: str,
    online: str | None,
    limit: int | None,
    progress: Progress = quiet,
) -> EvalReport:
    """Measure a model by hand: our checkpoints, online FP8 and an FP8 KV cache are candidates, else a baseline."""
    from fp8pipe.evaluate import evaluate

    checkpoint = Checkpoint.load_if_present(evidence(Path(model), "checkpoint")) if Path(model).is_dir() else None
    if checkpoint is not None:
        path, model_id, fingerprint = Path(model), checkpoint.model_id, checkpoint.fingerprint
    else:
        snapshot = fetch(pin(model), progress=progress)
        path, model_id, fingerprint = snapshot.path, snapshot.model_id, snapshot.commit
    changed = checkpoint is not None or online is not None or kv_cache_dtype != "auto"
    return evaluate(
        path,
        suite,
        folder,
        role="candidate" if changed else "baseline",
        model_id=model_id,
        fingerprint=fingerprint,
        kv_cache_dtype=kv_cache_dtype,
        online=online,
        limit=limit,
        progress=progress,
    )


# ------------------------------------------------------------------------------------------ gate, publish


def decide_release(
    baseline: EvalReport,
    candidate: EvalReport,
    policy: GatePolicy,
    *,
    suite: EvalSuite | None,
    checkpoint_folder: Path | None,
    attempt: int = 1,
    attempts: int = 1,
    look: int = 1,
    earlier: Sequence[EarlierAttempt] = (),
) -> GateDecision:
    """The verdict; with a checkpoint folder also its evidence, gate.json last, once nothing more is to be measured."""
    from fp8pipe.gate import decide
    from fp8pipe.quantize.plan import Plan

    asked: dict[str, Any] = {"suite": suite, "attempt": attempt, "attempts": attempts, "look": look, "earlier": earlier}
    if checkpoint_folder is None:
        return decide(baseline, candidate, policy, **asked)
    asked["checkpoint"] = Checkpoint.load(evidence(checkpoint_folder, "checkpoint"))
    asked["recipe"] = Plan.load(evidence(checkpoint_folder, "plan")).settings
    decision = decide(baseline, candidate, policy, **asked)
    if decision.final and GateDecision.load_if_present(evidence(checkpoint_folder, "gate")) != decision:
        _write_evidence(checkpoint_folder, baseline, candidate, policy, decision)
    return decision


def gate_reports(
    baseline: Path, candidate: Path, policy: GatePolicy, *, checkpoint: Path | None = None
) -> GateDecision:
    """Decide by hand between two folders, each written by `evaluate` or by lm-eval with `--log_samples`.

    A checkpoint that was an attempt of a ladder stays that attempt: its alpha is not made larger by asking again.
    """
    from fp8pipe.evaluate.request import EvalRequest
    from fp8pipe.gate.foreign import read_report
    from fp8pipe.model.identity import folder_identity

    ours, theirs = read_report(baseline, role="baseline"), read_report(candidate, role="candidate")
    if checkpoint is not None and theirs.folder_identity not in {None, folder_identity(checkpoint)}:
        raise SourceChanged(f"{checkpoint}: not what {candidate} measured, or altered since then; evaluate it again")
    asked = EvalRequest.load_if_present(baseline / "request.json")
    share = asked.share if asked is not None else 1.0
    if share not in policy.looks:
        raise InputError(
            f"{baseline}: measured on {share:g} of the samples, policy {policy.name} looks at {policy.looks}"
        )
    return decide_release(
        ours,
        theirs,
        policy,
        suite=asked.suite if asked is not None else None,
        checkpoint_folder=checkpoint,
        look=policy.looks.index(share) + 1,
        **_attempt_of(checkpoint, policy),
    )


def _attempt_of(checkpoint: Path | None, policy: GatePolicy) -> dict[str, Any]:  # Any: arguments of `decide_release`
    """Which attempt of a ladder the checkpoint was, as its decision says."""
    before = GateDecision.load_if_present(evidence(checkpoint, "gate")) if checkpoint is not None else None
    if before is None:
        return {}
    if before.max_attempts > policy.max_attempts:
        raise InputError(
            f"{checkpoint}: attempt {before.attempt} of {before.max_attempts}, policy {policy.name} has max_attempts: "
            f"{policy.max_attempts}; decide with the policy of the release"
        )
    return {"attempt": before.attempt, "attempts": before.max_attempts, "earlier": before.earlier}


def _write_evidence(
    folder: Path, baseline: EvalReport, candidate: EvalReport, policy: GatePolicy, decision: GateDecision
) -> None:
    from fp8pipe.records.calibration import Calibration
    from fp8pipe.release.plots import write_plots, write_sensitivity_plot

    baseline.save(evidence(folder, "baseline"))
    candidate.save(evidence(folder, "candidate"))
    write_atomically(evidence(folder, "policy"), policy.model_dump_json(indent=1).encode())
    plots = folder / RECORD_DIR / "plots"
    shutil.rmtree(plots, ignore_errors=True)
    write_plots(decision, baseline, candidate, plots)
    calibration = Calibration.load_if_present(evidence(folder, "calibration"))
    if calibration is not None:
        write_sensitivity_plot(calibration, plots)
    decision.save(evidence(folder, "gate"))


def may_publish(folder: Path) -> bool:
    """Whether the folder may be published; Refused if the verdict allows it and something else forbids it."""
    from fp8pipe.gate import publishable

    return publishable.may_publish(folder)


def is_question(decision: GateDecision, policy: GatePolicy) -> bool:
    """Whether a person is to be asked: inconclusive, nothing left unchecked, and a policy that lets people decide."""
    return decision.verdict == "inconclusive" and not decision.unchecked and policy.on_inconclusive == "ask"


def approve_folder(folder: Path, *, who: str, reason: str) -> Approval:
    """A person's decision to release what the gate left inconclusive."""
    from fp8pipe.gate.approval import approve

    return approve(folder, who=who, reason=reason)


def publish_folder(folder: Path, *, repo_id: str, collection: str | None, progress: Progress = quiet) -> Release:
    """Card, upload, verification, tag and collection item for an accepted checkpoint; idempotent."""
    from fp8pipe.gate.publishable import require_publishable
    from fp8pipe.release.card import card_for_folder, collection_note
    from fp8pipe.release.publish import publish

    decision = require_publishable(folder).decision
    card, note = card_for_folder(folder, repo_id=repo_id), collection_note(decision)
    return publish(folder, repo_id=repo_id, card=card, collection=collection, note=note, progress=progress)


# ------------------------------------------------------------------------------------------ outcomes


def earlier_attempts(path: Sequence[Outcome]) -> tuple[EarlierAttempt, ...]:
    """The rungs of a ladder that were tried, as the next decision tells them."""
    return tuple(EarlierAttempt(recipe=one.recipe, fingerprint=one.fingerprint, reason=one.reason) for one in path)


def released_by_decision(folder: Path, release: Release) -> Outcome | None:
    """The outcome beside a checkpoint folder, now with the release that a person decided on; None without one."""
    path = folder.parent / "release.json"
    outcome = Outcome.load_if_present(path)
    if outcome is None:
        return None
    outcome = outcome.model_copy(update={"release": release})
    outcome.save(path)
    return outcome


def unsound(job: ResolvedRelease, snapshot: Snapshot, checkpoint: Checkpoint, report: ValidationReport) -> Outcome:
    """The release ended before any evaluation: the validator found errors."""
    reason = f"{len(report.errors)} validation errors, the first: {report.errors[0].sentence()}"
    return _outcome(job, snapshot, checkpoint, "unsound", reason, None, None)


def decided(
    job: ResolvedRelease, snapshot: Snapshot, checkpoint: Checkpoint, decision: GateDecision, release: Release | None
) -> Outcome:
    """The release ended at the gate, or after it on the Hub."""
    return _outcome(job, snapshot, checkpoint, decision.verdict, decision.reason, decision, release)


def _outcome(
    job: ResolvedRelease,
    snapshot: Snapshot,
    checkpoint: Checkpoint,
    verdict: Literal["accepted", "rejected", "inconclusive", "unsound"],
    reason: str,
    decision: GateDecision | None,
    release: Release | None,
) -> Outcome:
    return Outcome(
        verdict=verdict,
        reason=reason,
        model_id=snapshot.model_id,
        source_commit=snapshot.commit,
        recipe=job.recipe.name,
        suite=job.suite.name,
        policy=job.policy.name,
        fingerprint=checkpoint.fingerprint,
        source_bytes=checkpoint.source_bytes,
        output_bytes=checkpoint.output_bytes,
        decision=decision,
        release=release,
    )
