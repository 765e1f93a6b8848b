"""The stages of a release, one function each: records in, the work of one room, a record out.

Calibrating, quantizing, validating and evaluating return a finished record that is still valid; the other stages are
quick and always run. The Prefect tasks and the commands call these functions, so that one attempt made command by
command equals an attempt of the flow. The flow alone knows fallbacks and looks. A function called `..._model` does the
same for a model that a person names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fp8pipe.config import EvalSuite, GatePolicy, LicenceClaim, Parallel, Recipe, ResolvedRelease, Target
from fp8pipe.errors import ConfigError, InputError, NoSuitableDevice, SourceChanged
from fp8pipe.files import write_atomically
from fp8pipe.progress import Overlap, Progress, quiet
from fp8pipe.records import (
    RECORD_DIR,
    Approval,
    Checkpoint,
    Depth,
    EarlierAttempt,
    EvalReport,
    GateDecision,
    Release,
    Serving,
    Snapshot,
    Terms,
    ValidationReport,
    Verification,
)
from fp8pipe.records.paths import record_path
from fp8pipe.release.workspace import Workspace

if TYPE_CHECKING:
    from fp8pipe.convert import Conversion, Method
    from fp8pipe.evaluate import Settles
    from fp8pipe.gate.evaluation_plan import EvalPlan
    from fp8pipe.quantize.plan import Plan
    from fp8pipe.records.calibration import Calibration


# ------------------------------------------------------------------------------------------ source, plan


def pin(model: str) -> Snapshot:
    """The model at one commit, nothing downloaded."""
    from fp8pipe.hub.source import resolve

    return resolve(model)


def check_target(job: ResolvedRelease) -> tuple[str, ...]:
    """Refuse, before any work, a release that could not be published after it. Returns notes for a person.

    Raises as `fp8pipe.release.admission.require_admission` and `pin` do.
    """
    from fp8pipe.release.admission import require_admission

    return require_admission(job, pin(job.spec.model))


def download(snapshot: Snapshot, *, trust_remote_code: bool = False, progress: Progress = quiet) -> Snapshot:
    """The same snapshot with its files on this machine; with its own Python code only if that is trusted."""
    from fp8pipe.hub.download import download

    return download(snapshot, trust_remote_code=trust_remote_code, progress=progress)


def plan(
    snapshot: Snapshot,
    recipe: Recipe,
    *,
    calibration: Calibration | None = None,
    trust_remote_code: bool = False,
    oracles: bool = True,
    meanwhile: Callable[[], None] | None = None,
) -> Plan:
    """What becomes of every tensor, decided from headers alone (read by HTTP ranges when the snapshot is on the Hub).

    Raises UnsupportedArchitecture for a model that the installed vLLM could not serve, ConfigError for a recipe whose
    checkpoint vLLM's loader would not read (which is asked unless `oracles` is False), and as `make_plan` does.

    calibration: under a recipe with `keep_bf16`, the modules that it found too sensitive stay unquantized. Without it
    the plan says what to calibrate. meanwhile: runs in a thread while an unknown architecture is examined.
    """
    from fp8pipe.hub.headers import read_headers
    from fp8pipe.oracle.transformers import inspect
    from fp8pipe.oracle.vllm_registry import require_class
    from fp8pipe.quantize.plan import make_plan
    from fp8pipe.validate.planned import require_read

    headers = read_headers(snapshot)
    architecture = inspect(snapshot, headers=headers, trust_remote_code=trust_remote_code, meanwhile=meanwhile)
    notes = require_class(snapshot, architecture)
    made = make_plan(snapshot, headers, recipe, architecture, keep=calibration.kept if calibration else None)
    serving = _serving(snapshot, made)
    if oracles:
        asked = require_read(snapshot, headers, made)
        notes += (asked.note,) if asked.note else ()
        serving = serving.without_vllm(asked.unread) if serving is not None and asked.unread else serving
    return made.model_copy(update={"serving": serving, "notes": (*made.notes, *notes)})


def _serving(snapshot: Snapshot, plan: Plan) -> Serving | None:
    """What will serve the checkpoint of `plan`."""
    from fp8pipe.hub.source import read_file
    from fp8pipe.validate.meaning.config import read_scheme
    from fp8pipe.validate.serving import what_serves

    config = json.loads(read_file(snapshot, "config.json"))
    tensors = {output.name: output.info for output in plan.outputs}
    return what_serves(config, read_scheme(plan.quantization_config), tensors)


def require_machine(
    snapshot: Snapshot, plan: Plan, suite: EvalSuite, policy: GatePolicy
) -> tuple[Parallel, tuple[str, ...]]:
    """Refuse, before anything is calibrated or quantized, what this machine cannot evaluate or what could not count.

    Returns how both sides are to be spread over its GPUs, so that they hold the model before and after; and warnings:
    of the machine, and of each device class of the policy on which no verdict would count. Raises
    NoSuitableDevice for a machine that cannot serve FP8, or cannot hold the model before or after, ConfigError for
    engine arguments that do not fit, and as `require_counted` does.
    """
    from fp8pipe.evaluate.arguments import check_arguments
    from fp8pipe.evaluate.footprint import need_of, spread, spread_over
    from fp8pipe.hub.source import read_file
    from fp8pipe.machine import device

    config = json.loads(read_file(snapshot, "config.json"))
    check_arguments(suite, config)
    cache = "fp8" if plan.settings.kv_cache is not None else "auto"
    before = need_of(f"{plan.model_id} unquantized", plan.source_bytes, config, suite.engine)
    engine = suite.engine | {"kv_cache_dtype": cache}
    after = need_of(f"{plan.model_id} under {plan.recipe}", plan.output_bytes, config, engine)
    here = device.detect()

    def serves(size: int) -> bool:
        known = plan.serving.on([here.device_class], size) if plan.serving is not None else ()
        return all(answer.counts for answer in known)

    parallel = spread(suite, [before, after], here.gpus, serves)
    machine = device.require([spread_over(need, parallel) for need in (before, after)])
    return parallel, (*machine.warnings, *require_counted(plan, policy, machine.device.device_class, parallel))


def require_counted(plan: Plan, policy: GatePolicy, device_class: str, parallel: Parallel) -> tuple[str, ...]:
    """A warning for each device class of the policy on which no verdict would count, because vLLM serves the plan's
    checkpoint by another kernel than its scheme asks for, or not at all.

    device_class: that of this machine. Raises NoSuitableDevice if it is one of them, and ConfigError if all are: two
    evaluations would end in a veto.
    """
    serving, size, expert = plan.serving, parallel.tensor, parallel.expert
    known = serving.on(policy.device_classes, size, expert_parallel=expert) if serving is not None else ()
    useless: dict[str, str] = {answer.device: answer.reason for answer in known if not answer.counts}
    warnings = tuple(f"recipe {plan.recipe}: no verdict counts on {name}: {why}" for name, why in useless.items())
    if useless and useless.keys() >= set(policy.device_classes):
        raise ConfigError(
            f"{'; '.join(warnings)}; choose another recipe, or a policy with another device class than {policy.name}'s"
        )
    if device_class in useless:
        others = ", ".join(name for name in policy.device_classes if name not in useless)
        raise NoSuitableDevice(
            f"recipe {plan.recipe}: no verdict counts on {device_class}, which this machine has: "
            f"{useless[device_class]}; run it on {others}, or choose another recipe"
        )
    return warnings


# ------------------------------------------------------------------------------------------ licence


def _keep_lineage(snapshot: Snapshot, folder: Path, claim: LicenceClaim | None, licences: str | None) -> None:
    """Write what the source's repository says of itself among the records: its card, the terms of its licence, its
    published scores; and beside the weights what the licence needs."""
    from fp8pipe.hub.source_card import read_source_card
    from fp8pipe.records.published import PublishedScores
    from fp8pipe.release.admission import terms_and_files
    from fp8pipe.release.card.published import read_published

    card, kept = read_source_card(snapshot), record_path(folder, "source_card")
    if card is not None:
        write_atomically(kept, card.encode())
    else:
        kept.unlink(missing_ok=True)
    terms, _, made = terms_and_files(snapshot, claim, licences)
    for name, content in made.items():
        write_atomically(folder / name, content)
    terms.save(record_path(folder, "terms"))
    PublishedScores(scores=read_published(snapshot)).save(record_path(folder, "published"))


def _keep_template(folder: Path, path: str | None) -> None:
    """Put a team's template of the card among the records, so that anyone can make the card again."""
    from fp8pipe.config import read_template

    kept = record_path(folder, "card_template")
    if path is not None:
        write_atomically(kept, read_template(path).encode())
    else:
        kept.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ calibrate, quantize


def calibrate(
    snapshot: Snapshot, plan: Plan, recipe: Recipe, workspace: Workspace, *, device: str, progress: Progress = quiet
) -> Calibration:
    """The ranges that this recipe needs. Recipes that need the same ones share them."""
    from fp8pipe.calibrate import calibration_key
    from fp8pipe.calibrate.child import calibrate_in_child

    key = calibration_key(snapshot, recipe, device=device)
    folder = workspace.calibration(key)
    return calibrate_in_child(snapshot, plan, recipe, folder, key=key, device=device, progress=progress)


def quantize(
    snapshot: Snapshot,
    plan: Plan,
    folder: Path,
    *,
    calibration: Calibration | None,
    device: str = "cpu",
    claim: LicenceClaim | None = None,
    licences: str | None = None,
    arrived: Callable[[Snapshot], None] = lambda snapshot: None,
    card_template: str | None = None,
    progress: Progress = quiet,
) -> tuple[Checkpoint, Snapshot]:
    """The checkpoint of `plan` in `folder`, beside its records, and the snapshot with its files on this machine.

    claim, licences, card_template: as in a release; they decide what is published with the checkpoint, not its bytes.

    Files that are still on the Hub are downloaded at the same time: each shard is quantized as soon as it has arrived.
    device: cpu, auto (also the CPU), cuda or cuda:<n>; the bytes are the same on each.
    arrived: called as soon as all files are on this machine, with the snapshot that says where; not for a checkpoint
    that was finished before.
    """
    from fp8pipe.hub.download import download_iter, local_snapshot
    from fp8pipe.hub.source import with_hashes
    from fp8pipe.quantize import device_for, quantize

    target, trusted = device_for(device), plan.trust_remote_code
    if snapshot.root is not None:
        arrived(snapshot)
        checkpoint = quantize(snapshot, plan, folder, calibration=calibration, device=target, progress=progress)
    else:
        both = Overlap(progress, "quantize")
        local = local_snapshot(snapshot, trust_remote_code=trusted)

        def arriving() -> Iterator[Path]:
            yield from download_iter(snapshot, trust_remote_code=trusted, progress=both.earlier)
            arrived(local)

        checkpoint = quantize(
            local, plan, folder, calibration=calibration, arriving=arriving(), device=target, progress=both.later
        )
    # Usually a no-op. A finished checkpoint whose source has left the cache is downloaded again, to be validated.
    snapshot = download(snapshot, trust_remote_code=trusted)
    with_hashes(snapshot).model_copy(update={"root": None}).save(record_path(folder, "source"))
    _keep_lineage(snapshot, folder, claim, licences)
    _keep_template(folder, card_template)
    return checkpoint, snapshot


def quantize_model(
    model: str,
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    oracles: bool = True,
    claim: LicenceClaim | None = None,
    licences: str | None = None,
    card_template: str | None = None,
    progress: Progress = quiet,
) -> Checkpoint:
    """A checkpoint folder from a model's name: pin, plan, calibrate if the recipe needs it, quantize.

    Its licence may still be open: nothing is published here.
    """
    from fp8pipe.config import read_template
    from fp8pipe.quantize import device_for, preload
    from fp8pipe.release.admission import terms_and_files
    from fp8pipe.release.card.render import check_template

    device_for(device)  # refuses an unknown device before anything is asked of the Hub
    snapshot = pin(model)
    terms_and_files(snapshot, claim, licences)  # refuses a wrong claim or template before hours of work
    if card_template is not None:
        check_template(read_template(card_template))
    chosen = plan(snapshot, recipe, trust_remote_code=trust_remote_code, oracles=oracles, meanwhile=preload)
    calibration = None
    if recipe.needs_calibration:
        snapshot = download(snapshot, trust_remote_code=trust_remote_code, progress=progress)
        workspace = Workspace(folder.parent / f".{folder.name}.work")
        calibration = calibrate(snapshot, chosen, recipe, workspace, device=device, progress=progress)
    if recipe.keep_bf16 is not None:
        chosen = plan(snapshot, recipe, calibration=calibration, trust_remote_code=trust_remote_code, oracles=oracles)
    return quantize(
        snapshot,
        chosen,
        folder,
        calibration=calibration,
        device=device,
        claim=claim,
        licences=licences,
        card_template=card_template,
        progress=progress,
    )[0]


def sensitivity(folder: Path) -> tuple[Calibration, Path | None]:
    """What FP8 costs each Linear of a calibrated checkpoint, and its plot (PNG, with the SVG beside it), drawn anew."""
    from fp8pipe.records.calibration import Calibration
    from fp8pipe.release.plots import write_sensitivity_plot

    path = record_path(folder, "calibration")
    if not path.is_file():
        raise InputError(f"{path}: no such record; the recipe needed no calibration, or {folder} is no checkpoint")
    calibration = Calibration.load(path)
    return calibration, write_sensitivity_plot(calibration, folder / RECORD_DIR / "plots")


# ------------------------------------------------------------------------------------------ validate


def validate(
    folder: Path, *, source: Snapshot | None, oracles: bool = True, progress: Progress = quiet
) -> ValidationReport:
    """The report on `folder` as it is now, for which the vLLM that is installed was asked unless `oracles` is False.

    An earlier report on the same state is returned if it read as much, that vLLM answered, and it found no error. An
    error may have been the fault of a wrong source, and silence that of the machine: both are looked into again."""
    from fp8pipe.model.identity import folder_identity
    from fp8pipe.oracle.vllm import version
    from fp8pipe.validate import validate

    path = record_path(folder, "validation")
    depth = "fidelity" if source is not None else "values"
    known = ValidationReport.load_if_present(path)
    vllm = version() if oracles else None
    covered = known is not None and known.sound and known.covers(depth) and (vllm is None or known.heard(vllm))
    if known is not None and covered and known.folder_identity == folder_identity(folder):
        return known
    report = validate(folder, source=source, oracles=None if oracles else False, progress=progress)
    _keep(report, folder)
    return report


def _keep(report: ValidationReport, folder: Path) -> None:
    """Save the report among a checkpoint's records, unless they hold a deeper one on the same content."""
    from fp8pipe.model.identity import folder_identity

    if Checkpoint.load_if_present(record_path(folder, "checkpoint")) is None:
        return
    path = record_path(folder, "validation")
    known = ValidationReport.load_if_present(path)
    if known is None or report.covers(known.depth) or known.folder_identity != folder_identity(folder):
        report.save(path)


def validate_model(
    model: str,
    *,
    source: str | None = None,
    depth: Depth | None = None,
    oracles: bool | None = None,
    progress: Progress = quiet,
) -> ValidationReport:
    """Validate by hand: a folder, or any repository of the Hub, from its headers alone unless `depth` asks for more.
    `oracles`: None asks vLLM where it is installed, True demands it and asks transformers too, False asks neither.

    A deeper validation downloads a repository. If its headers already show that its files cannot be read, nothing is
    downloaded, and the report's own depth stays `headers`.
    """
    from fp8pipe.validate import UNREADABLE, validate

    theirs = pin(source) if source else None
    folder = Path(model).expanduser()
    if folder.is_dir() or model.startswith(("/", ".", "~")):
        if theirs is not None and depth in (None, "fidelity", "loaded"):
            theirs = download(theirs, progress=progress)
        report = validate(folder, source=theirs, depth=depth, oracles=oracles, progress=progress)
        _keep(report, folder)
        return report
    ours = pin(model)
    shallow = depth in (None, "headers")
    report = validate(ours, source=theirs, depth="headers", oracles=oracles if shallow else False, progress=progress)
    if shallow or any(finding.check in UNREADABLE for finding in report.errors):
        return report
    ours = ours.model_copy(update={"root": download(ours, progress=progress).root})
    theirs = download(theirs, progress=progress) if theirs is not None and depth in ("fidelity", "loaded") else theirs
    return validate(ours, source=theirs, depth=depth, oracles=oracles, progress=progress)


# ------------------------------------------------------------------------------------------ convert


def convert(
    model: str, output: Path | None, *, to: Method | None, progress: Progress = quiet
) -> tuple[Conversion, Path]:
    """Rewrite an FP8 checkpoint in the format `to`; if that is None, only rename its legacy tensors.

    Returns the record and the folder: `output`, or a name made of the source's and the format, beside a source folder
    or in the current one. A conversion without changes writes nothing.
    """
    from fp8pipe.convert import convert, plan_conversion
    from fp8pipe.hub.headers import read_headers

    snapshot = pin(model)
    snapshot = download(snapshot, trust_remote_code=snapshot.is_local, progress=progress)
    plan = plan_conversion(snapshot, read_headers(snapshot), to=to)
    beside = snapshot.path.parent if snapshot.is_local else Path()
    folder = output or beside / f"{snapshot.model_id.rpartition('/')[2]}-{to or 'migrated'}"
    return convert(plan, folder, progress=progress), folder


# ------------------------------------------------------------------------------------------ evaluate


def plan_evaluation(policy: GatePolicy, suite: EvalSuite, folder: Path, *, attempts: int = 1) -> EvalPlan:
    """What the suite's samples can settle, before any is scored. `folder` keeps the document counts."""
    from fp8pipe.evaluate.documents import count_documents
    from fp8pipe.gate.evaluation_plan import plan_evaluation

    gated = suite.model_copy(update={"tasks": {name: suite.tasks[name] for name in policy.gated_tasks}})
    found = count_documents(gated, folder)
    return plan_evaluation(policy, suite.name, found.counts, subtasks=found.subtasks, attempts=attempts)


def engine_leaves_the_cpu() -> bool:
    """Whether an engine on this machine serves on another device than the CPU, on which a release quantizes."""
    from fp8pipe.evaluate.request import this_host

    return not this_host().on_cpu


def evaluate_baseline(
    snapshot: Snapshot,
    suite: EvalSuite,
    workspace: Workspace,
    *,
    looks: tuple[float, ...] = (1.0,),
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> tuple[EvalReport, ...]:
    """The source model's own measurement, made once for all recipes: one report for each look.

    It is measured to the end, since it cannot wait on its device for the verdicts on a candidate that needs the same.
    """
    from fp8pipe.evaluate import baseline_key, evaluate, request_for

    request = request_for(
        snapshot.path,
        suite,
        role="baseline",
        model_id=snapshot.model_id,
        fingerprint=snapshot.commit,
        looks=looks,
        rates=workspace.flip_rates,
        trust_remote_code=trust_remote_code,
    )
    folder = workspace.baseline(baseline_key(snapshot.commit, suite, looks=looks, parallel=request.parallel))
    reports: list[EvalReport] = []

    def collect(report: EvalReport, look: int) -> bool:
        reports.append(report)
        return False

    evaluate(request, folder, settles=collect, progress=progress)
    return tuple(reports)


def evaluate_candidate(
    checkpoint_folder: Path,
    suite: EvalSuite,
    folder: Path,
    *,
    baseline: EvalReport | None = None,
    looks: tuple[float, ...] = (1.0,),
    settles: Settles | None = None,
    progress: Progress = quiet,
) -> EvalReport:
    """The checkpoint's measurement, served as its recipe intends, up to the look whose report `settles` the matter.

    The engine starts with the smaller settings that its `baseline` needed to fit into memory. FP8 may fit where BF16
    did not, but measurements with two context lengths cannot be compared.
    """
    from fp8pipe.evaluate import evaluate, request_for
    from fp8pipe.quantize.plan import Plan

    checkpoint = Checkpoint.load(record_path(checkpoint_folder, "checkpoint"))
    request = request_for(
        checkpoint_folder,
        suite,
        role="candidate",
        model_id=checkpoint.model_id,
        fingerprint=checkpoint.fingerprint,
        kv_cache_dtype=_kv_cache_dtype(checkpoint_folder),
        looks=looks,
        retries=baseline.retries if baseline is not None else (),
        trust_remote_code=Plan.load(record_path(checkpoint_folder, "plan")).trust_remote_code,
        source_bytes=checkpoint.source_bytes,
    )
    return evaluate(request, folder, settles=settles, progress=progress)


def evaluate_model(
    model: str,
    suite: EvalSuite,
    folder: Path,
    *,
    kv_cache_dtype: str,
    online: str | None,
    limit: int | None,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> EvalReport:
    """Measure a model by hand: a candidate if it is a checkpoint of fp8pipe or served in FP8, else a baseline."""
    from fp8pipe.evaluate import evaluate, request_for
    from fp8pipe.machine import device

    device.require(())  # before anything is downloaded; the engine's process looks at the model's size
    checkpoint = Checkpoint.load_if_present(record_path(Path(model), "checkpoint")) if Path(model).is_dir() else None
    if checkpoint is not None:
        path, model_id, fingerprint = Path(model), checkpoint.model_id, checkpoint.fingerprint
        kv_cache_dtype = _kv_cache_dtype(path) if kv_cache_dtype == "auto" else kv_cache_dtype
    else:
        snapshot = download(pin(model), trust_remote_code=trust_remote_code, progress=progress)
        path, model_id, fingerprint = snapshot.path, snapshot.model_id, snapshot.commit
    changed = checkpoint is not None or online is not None or kv_cache_dtype != "auto"
    request = request_for(
        path,
        suite,
        role="candidate" if changed else "baseline",
        model_id=model_id,
        fingerprint=fingerprint,
        kv_cache_dtype=kv_cache_dtype,
        online=online,
        limit=limit,
        trust_remote_code=trust_remote_code,
        source_bytes=checkpoint.source_bytes if checkpoint is not None else 0,
    )
    return evaluate(request, folder, progress=progress)


def _kv_cache_dtype(checkpoint_folder: Path) -> str:
    """The KV cache's dtype that a checkpoint is made for: fp8 if its recipe has a scheme for the cache."""
    from fp8pipe.quantize.plan import Plan

    recipe = Plan.load(record_path(checkpoint_folder, "plan")).settings
    return "fp8" if recipe.kv_cache is not None else "auto"


# ------------------------------------------------------------------------------------------ gate, publish


def gate(
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
    """The verdict. With a checkpoint folder, a final decision also writes the evidence there, gate.json last."""
    from fp8pipe.gate import decide
    from fp8pipe.quantize.plan import Plan

    checkpoint = recipe = None
    if checkpoint_folder is not None:
        checkpoint = Checkpoint.load(record_path(checkpoint_folder, "checkpoint"))
        recipe = Plan.load(record_path(checkpoint_folder, "plan")).settings
    decision = decide(
        baseline,
        candidate,
        policy,
        suite=suite,
        checkpoint=checkpoint,
        recipe=recipe,
        attempt=attempt,
        attempts=attempts,
        look=look,
        earlier=earlier,
    )
    if checkpoint_folder is not None and decision.final:
        _write_evidence(checkpoint_folder, baseline, candidate, policy, suite, decision)
    return decision


def gate_reports(
    baseline: Path, candidate: Path, policy: GatePolicy, *, checkpoint: Path | None = None
) -> GateDecision:
    """The verdict on two folders, each written by `evaluate` or by lm-eval with `--log_samples`.

    A checkpoint that was an attempt of a fallback ladder stays that attempt: gating it again adds nothing to its alpha.
    """
    from fp8pipe.evaluate import looks
    from fp8pipe.evaluate.request import EvalRequest
    from fp8pipe.gate.foreign import read_report
    from fp8pipe.model.identity import folder_identity

    ours, theirs = read_report(baseline, role="baseline"), read_report(candidate, role="candidate")
    request = EvalRequest.load_if_present(baseline / "request.json")
    asked = EvalRequest.load_if_present(candidate / "request.json")
    if request is not None and asked is not None and asked.share in request.looks[:-1]:
        # The candidate was decided early, or is not through: compare with the baseline up to the same look.
        request = request.up_to(request.looks.index(asked.share) + 1)
        ours = looks.find(baseline, request) or ours
    if checkpoint is not None and theirs.folder_identity not in {None, folder_identity(checkpoint)}:
        raise SourceChanged(f"{checkpoint}: not what {candidate} measured, or changed since then; evaluate it again")
    share = request.share if request is not None else 1.0
    if share not in policy.looks:
        raise InputError(
            f"{baseline}: measured on {share:g} of the samples, but policy {policy.name} looks at {policy.looks}; "
            "evaluate with the looks of that policy"
        )
    before = GateDecision.load_if_present(record_path(checkpoint, "gate")) if checkpoint is not None else None
    if before is not None and before.max_attempts > policy.max_attempts:
        raise InputError(
            f"{checkpoint}: was attempt {before.attempt} of {before.max_attempts}, but policy {policy.name} has "
            f"max_attempts: {policy.max_attempts}; decide with the policy of the release"
        )
    return gate(
        ours,
        theirs,
        policy,
        suite=request.suite if request is not None else None,
        checkpoint_folder=checkpoint,
        attempt=before.attempt if before is not None else 1,
        attempts=before.max_attempts if before is not None else 1,
        look=policy.looks.index(share) + 1,
        earlier=before.earlier if before is not None else (),
    )


def _write_evidence(
    folder: Path,
    baseline: EvalReport,
    candidate: EvalReport,
    policy: GatePolicy,
    suite: EvalSuite | None,
    decision: GateDecision,
) -> None:
    """Write what publishing asks for, gate.json last; nothing if the folder already has all of it."""
    from fp8pipe.gate.publishable import read_policy, read_suite
    from fp8pipe.records.calibration import Calibration
    from fp8pipe.release.plots import write_plots, write_sensitivity_plot

    sides = {"baseline": baseline, "candidate": candidate}
    # The path of its task files is private; what is in them is in the reports' digest of the suite.
    suite = suite and suite.model_copy(update={"task_dir": None})
    held = {name: EvalReport.load_if_present(record_path(folder, name)) for name in sides}
    known = GateDecision.load_if_present(record_path(folder, "gate")), read_policy(folder), read_suite(folder)
    if held == sides and known == (decision, policy, suite):
        return
    for name, report in sides.items():
        report.save(record_path(folder, name))
    for name, config in (("policy", policy), ("suite", suite)):
        path = record_path(folder, name)
        if config is None:
            path.unlink(missing_ok=True)
        else:
            write_atomically(path, config.model_dump_json(indent=1).encode() + b"\n")
    plots = folder / RECORD_DIR / "plots"
    shutil.rmtree(plots, ignore_errors=True)
    write_plots(decision, baseline, candidate, plots)
    calibration = Calibration.load_if_present(record_path(folder, "calibration"))
    if calibration is not None:
        write_sensitivity_plot(calibration, plots)
    decision.save(record_path(folder, "gate"))


def may_publish(folder: Path) -> bool:
    """Whether the folder may be published. Raises Refused if the verdict allows it but something else forbids it."""
    from fp8pipe.gate import publishable

    return publishable.may_publish(folder)


def is_question(decision: GateDecision, policy: GatePolicy) -> bool:
    """Whether a person is to be asked: inconclusive, nothing left unchecked, and a policy that lets people decide."""
    from fp8pipe.gate.publishable import policy_objection

    open_question = decision.verdict == "inconclusive" and not decision.unchecked
    return open_question and policy_objection(decision, policy) is None


def approve(folder: Path, *, who: str, reason: str) -> Approval:
    """A person's decision to release what the gate left inconclusive."""
    from fp8pipe.gate.approval import approve

    return approve(folder, who=who, reason=reason)


def card(folder: Path, *, repo_id: str, template: str | None = None) -> str:
    """The card of a checkpoint folder as `publish` would make it, were it the first of its repository; `template` as in
    a release. Writes nothing.

    Raises InputError for a record that is missing, ConfigError for a template that is wrong.
    """
    from dataclasses import replace

    from fp8pipe.config import read_template
    from fp8pipe.release.card import render_card
    from fp8pipe.release.card.facts import facts_of_folder
    from fp8pipe.release.tags import tag_of

    tag = tag_of(Checkpoint.load(record_path(folder, "checkpoint")).fingerprint, 1)
    facts = facts_of_folder(folder, repo_id=repo_id, tag=tag)
    return render_card(facts if template is None else replace(facts, template=read_template(template)))


def publish(folder: Path, target: Target, *, progress: Progress = quiet) -> Release:
    """Card, upload, verification, tag and collection item for an accepted checkpoint; idempotent."""
    from fp8pipe.gate.publishable import require_publishable
    from fp8pipe.release.card import card_for_folder, collection_note
    from fp8pipe.release.licence import require
    from fp8pipe.release.publish import publish

    note = collection_note(require_publishable(folder).decision)
    terms = Terms.load(record_path(folder, "terms"))
    require(terms, target.repo_id, [path.name for path in folder.iterdir() if path.is_file()])

    def card(tag: str) -> str:
        return card_for_folder(folder, repo_id=target.repo_id, tag=tag)

    return publish(folder, target, card=card, note=note, progress=progress)


def verify(
    release: str, *, key: Path | None = None, download: bool = False, progress: Progress = quiet
) -> Verification:
    """Every part of a published release (a repository, `repository@tag`, or a folder), and whether it holds."""
    from fp8pipe.release.verify import verify

    return verify(release, key=key, download=download, progress=progress)
