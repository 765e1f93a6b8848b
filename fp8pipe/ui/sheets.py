"""Records as tables for people: one sheet per record, drawn in the terminal or as Markdown."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from fp8pipe.model.identity import SIGNATURE
from fp8pipe.progress import human_bytes
from fp8pipe.records import (
    RECORD_DIR,
    BatchResult,
    EvalReport,
    GateDecision,
    Outcome,
    Reconciliation,
    Release,
    ReleaseStatus,
    Serving,
    Terms,
    ValidationReport,
    Verification,
    Withdrawal,
    metric_label,
)
from fp8pipe.release.card.markdown import escape

if TYPE_CHECKING:
    from rich.console import Group

    from fp8pipe.config import EvalSuite, GatePolicy
    from fp8pipe.convert import Conversion
    from fp8pipe.gate.evaluation_plan import EvalPlan
    from fp8pipe.quantize.plan import Plan
    from fp8pipe.records.calibration import Calibration
    from fp8pipe.ui.doctor import Diagnosis


NAME = 26
"""Longest part of a name in one line of a terminal, in characters."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """A titled table with notes below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    right: frozenset[int] = frozenset()
    """Indices of columns with numbers."""
    names: frozenset[int] = frozenset()
    """Indices of columns with long names, which a terminal breaks after a dot, slash or dash."""


def terminal(sheet: Sheet) -> Group:
    """Draw the sheet for a rich console."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    titled = any(sheet.columns)
    table = Table(title=sheet.title, box=box.SIMPLE_HEAD if titled else None, title_justify="left", title_style="bold")
    table.show_header = titled
    for index, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if index in sheet.right else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*(Text(_broken(cell) if i in sheet.names else cell) for i, cell in enumerate(row)))
    parts = [table] if sheet.rows else [Text(sheet.title, style="bold")]
    return Group(*parts, *(Text(note) for note in sheet.notes))


def _broken(cell: str) -> str:
    """Break long names after punctuation: rich would break them anywhere."""
    return re.sub(rf"(?=\S{{{NAME + 1}}})\S{{1,{NAME}}}[./:-](?=\S)", lambda found: f"{found[0]}\n", cell)


def markdown(sheet: Sheet) -> str:
    """Write the sheet as Markdown. Its texts are words, whatever is in the names of other people's models."""
    lines = [f"## {escape(sheet.title)}", ""]
    if sheet.rows:
        rules = ("---:" if index in sheet.right else "---" for index in range(len(sheet.columns)))
        lines += [_row(map(escape, sheet.columns)), _row(rules), *(_row(map(escape, row)) for row in sheet.rows), ""]
    lines += [f"- {escape(note)}" for note in sheet.notes]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plots_markdown(checkpoint_folder: Path) -> str:
    """The checkpoint's plots as Markdown with the images inline, so that they show wherever an artifact is read."""
    parts = []
    for path in sorted((checkpoint_folder / RECORD_DIR / "plots").glob("*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f"\n![{path.stem}](data:image/png;base64,{data})\n")
    return "".join(parts)


# ------------------------------------------------------------------------------------------ one sheet per record

MAX_FINDINGS = 100
"""Most findings in a table for people; --json has them all."""


def findings_sheet(report: ValidationReport) -> Sheet:
    """Findings, errors first. Below them, once per check: what vLLM would do, and the remedy."""
    ordered = (*report.errors, *report.warnings)
    rows = tuple(
        (f.check, f.severity, "\n".join(place for place in (f.tensor, f.file) if place), f.expected, f.found)
        for f in ordered[:MAX_FINDINGS]
    )
    advice = dict.fromkeys((f.check, f.consequence, f.remedy) for f in ordered)
    more = (f"{len(ordered) - MAX_FINDINGS} more findings: see --json",) if len(ordered) > MAX_FINDINGS else ()
    verdict = "sound" if report.sound else "NOT sound"
    notes = (
        *more,
        *(f"{check}: {consequence}. Remedy: {remedy}" for check, consequence, remedy in advice),
        f"{verdict}: {len(report.errors)} errors, {len(report.warnings)} warnings",
        f"{report.tensors} tensors, {len(report.checks)} checks",
        f"depth {report.depth}, {human_bytes(report.bytes_read)} read",
        report.vllm_silent or f"vLLM {report.vllm} was asked",
        *filter(None, (report.loaded_silent,)),
    )
    return Sheet("Validation", ("check", "severity", "where", "expected", "found"), rows, notes, names=frozenset({2}))


def evaluation_sheet(baseline: EvalReport, candidate: EvalReport) -> Sheet:
    """Baseline and candidate, metric by metric."""
    rows = []
    for task in baseline.tasks:
        other = candidate.task(task.task)
        for metric in task.metrics:
            mine = other.samples_of(metric.metric, metric.filter) if other else None
            rows.append(
                (
                    task.task,
                    f"{metric.metric},{metric.filter}",
                    str(len(metric.values)),
                    _with_error(metric.mean, metric.stderr),
                    _with_error(mine.mean, mine.stderr) if mine else "missing",
                )
            )
    engine = candidate.engine
    notes = (
        f"device {engine.device_class} ({engine.device_name}), vLLM {candidate.versions.get('vllm', '?')}",
        f"candidate served by {', '.join(engine.linear_kernels) or 'unquantized kernels'}",
        f"candidate's KV cache {engine.kv_cache_dtype}",
        *(note for report in (baseline, candidate) for note in measurement_notes(report)),
    )
    columns = ("task", "metric", "n", "baseline", "candidate")
    return Sheet("Evaluation", columns, tuple(rows), notes, right=frozenset({2, 3, 4}))


def measurement_notes(report: EvalReport) -> list[str]:
    """Everything in a report except the scores: odd samples, the engine's own noise, speed, memory, retries."""
    who = report.role
    notes = [
        f"{who} {'answers nothing' if sample.finding == 'empty' else 'repeats itself'} after {sample.prompt!r}"
        for sample in report.samples
        if sample.finding
    ]
    notes += [
        f"{flip.task} {flip.metric},{flip.filter}: {flip.flipped} of {flip.n} answers differ when the {who} runs twice"
        + (f" (measured with suite {flip.suite})" if flip.suite else "")
        for flip in report.flips
    ]
    if report.serving is not None:
        notes.append(f"{who} served: {serving_line(report)}")
    notes += [f"{who} ran out of memory, measured with {_arguments(retry.changed)}" for retry in report.retries]
    return notes


def serving_line(report: EvalReport) -> str:
    """Speed and memory of one engine, in one line."""
    assert report.serving is not None
    figures, memory = report.serving, report.engine.model_bytes
    parts = [
        f"{figures.request_throughput:.2f} requests/s",
        f"{figures.output_throughput:.0f} tokens/s",
        f"first token {figures.median_ttft_ms:.0f} ms",
        f"between tokens {figures.median_itl_ms:.1f} ms",
        *([f"weights {human_bytes(memory)}"] if memory else []),
    ]
    return ", ".join(parts) + ("" if figures.comparable else " (on a CPU: not comparable)")


def _arguments(changed: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changed.items())


def decision_sheet(decision: GateDecision) -> Sheet:
    """The tests, and every rule with its outcome."""
    rows = tuple(
        (
            metric_label(task, decision.tasks),
            str(task.n),
            f"{task.baseline:.4f}",
            f"{task.candidate:.4f}",
            f"{100 * task.drop:+.2f}",
            f"[{100 * task.drop_lower:+.2f}, {100 * task.drop_upper:+.2f}]",
            f"{100 * task.margin:.2f}",
            task.verdict,
        )
        for task in decision.tasks
    )
    notes = (
        f"{decision.verdict.upper()}: {decision.reason}",
        *(f"earlier attempt: recipe {tried.recipe} was rejected: {tried.reason}" for tried in decision.earlier),
        *(f"{rule.rule}: {rule.outcome}, {rule.reason}" for rule in decision.rules),
    )
    columns = ("task", "n", "baseline", "candidate", "drop, points", "interval", "margin", "verdict")
    return Sheet("Gate", columns, rows, notes, right=frozenset(range(1, 7)))


def eval_plan_sheet(plan: EvalPlan, policy: GatePolicy, suite: EvalSuite) -> Sheet:
    """What each task's samples can settle."""
    rows = tuple(
        (
            task.task,
            f"{task.metric},{task.filter}",
            f"{task.samples:,}" + (f" in {task.subtasks}" if task.subtasks else ""),
            task.assumes,
            f"{task.shown(task.margin)} {task.unit}",
            f"{100 * task.power:.1f}",
            "none will do" if task.samples_needed is None else f"{task.samples_needed:,}",
            "none" if task.resolvable_margin is None else f"{task.shown(task.resolvable_margin)} {task.unit}",
            "no" if task in plan.unresolved else "yes",
        )
        for task in plan.tasks
    )
    notes = (
        *((f"{policy.name}: {policy.description}",) if policy.description else ()),
        *((f"{suite.name}: {suite.description}",) if suite.description else ()),
        "power: probability that an undamaged candidate is accepted; on all metrics together "
        f"{100 * plan.acceptance:.1f} %, the policy asks for {100 * plan.power:g} %",
        f"alpha {plan.alpha:g} over {len(plan.looks)} look(s) and {plan.attempts} attempt(s): "
        f"{plan.alpha_spent:.3g} each",
    )
    columns = ("task", "metric", "samples", "assumed", "margin", "power, %", "needed", "margin resolved", "resolved")
    title = f"Policy {plan.policy} on suite {plan.suite}"
    return Sheet(title, columns, rows, notes, right=frozenset({2, 4, 5, 6, 7}))


def release_sheet(release: Release) -> Sheet:
    """Where the release is."""
    rows = [
        ("repo", release.repo_id),
        ("commit", release.commit + ("" if release.new_commit else " (already there: nothing uploaded)")),
        ("tag", release.tag),
        ("card", release.repo_url),
        ("seen by", {"private": "its owners", "gated": "who was granted access", "public": "all"}[release.visibility]),
    ]
    if SIGNATURE in {file.name for file in release.files}:
        rows.append(("signature", SIGNATURE))
    if release.collection_url:
        rows.append(("collection", release.collection_url))
    return Sheet("Release", ("", ""), tuple(rows), (release.visibility_note,) if release.visibility_note else ())


MAX_FAULTS = 10
"""Most faults of one part in a table for people; --json has them all."""


def verification_sheet(verification: Verification) -> Sheet:
    """Every part of a release, and what proves it or what is wrong with it."""
    rows: list[tuple[str, ...]] = []
    for proof in verification.proofs:
        left = len(proof.found) - MAX_FAULTS
        lines = (*proof.found[:MAX_FAULTS], *([f"and {left} more; see --json"] if left > 0 else []))
        rows += [(proof.part, proof.outcome, line) for line in lines[:1]]
        rows += [("", "", line) for line in lines[1:]]
    broken = [proof.part for proof in verification.proofs if proof.outcome == "broken"]
    unproven = [proof.part for proof in verification.proofs if proof.outcome == "open"]
    verdict = f"broken: {', '.join(broken)}" if broken else "nothing is broken"
    notes = (f"{verdict}; not proven: {', '.join(unproven)}" if unproven else verdict,)
    commit = f" at commit {verification.commit}" if verification.commit else ""
    title = f"Release {verification.tag or '(none)'} of {verification.model_id}{commit}"
    return Sheet(title, ("part", "outcome", "found"), tuple(rows), notes)


def withdrawal_sheet(withdrawal: Withdrawal) -> Sheet:
    """What a yank changed on the Hub, and how to publish there again."""
    yank = withdrawal.yank
    rows = [
        ("repo", withdrawal.repo_id),
        ("yanked", yank.tag),
        ("by", f"{yank.by}, {yank.when[:10]}"),
        ("reason", yank.reason),
        ("commit", withdrawal.commit + ("" if withdrawal.new_commit else " (already there)")),
        *(("no longer in", slug) for slug in withdrawal.left),
    ]
    again = f"The tag stays. To publish there again: --supersedes {yank.tag}"
    note = again if withdrawal.newest else "The tag stays. main shows another release, which nothing was changed of."
    return Sheet("Yanked", ("", ""), tuple(rows), (note,))


def outcome_sheet(outcome: Outcome) -> Sheet:
    """How a release ended, in one table."""
    rows: list[tuple[str, str]] = [
        ("model", f"{outcome.model_id} @ {outcome.source_commit[:12]}"),
        ("recipe", outcome.recipe),
        ("size", _sizes(outcome)),
    ]
    for task in outcome.decision.tasks if outcome.decision else ():
        filtered = "" if task.filter == "none" else f",{task.filter}"
        rows.append(
            (f"{task.task} {task.metric}{filtered}", f"{task.baseline:.4f} -> {task.candidate:.4f}  (n={task.n})")
        )
        interval = f"[{100 * task.drop_lower:+.2f}, {100 * task.drop_upper:+.2f}]"
        rows.append(("  drop, points", f"{100 * task.drop:+.2f}  interval {interval}, margin {100 * task.margin:.2f}"))
    rows.append(("verdict", outcome.verdict.upper()))
    notes = (outcome.reason, *outcome.notes)
    if outcome.release:
        published = release_sheet(outcome.release)
        rows += list(published.rows)  # type: ignore[arg-type]  # rows of pairs
        notes = (*notes, *published.notes)
    else:
        rows.append(("published", "nothing"))
    return Sheet("fp8pipe release", ("", ""), tuple(rows), notes)


def _sizes(outcome: Outcome) -> str:
    share = outcome.output_bytes / outcome.source_bytes
    return f"{human_bytes(outcome.source_bytes)} -> {human_bytes(outcome.output_bytes)}  ({share:.0%})"


def batch_sheet(result: BatchResult) -> Sheet:
    """One row per release."""
    rows = tuple(
        (
            entry.model,
            entry.recipe,
            entry.repo_id,
            entry.outcome.verdict if entry.outcome else "failed",
            entry.outcome.reason if entry.outcome else entry.error or "",
        )
        for entry in result.entries
    )
    counts = Counter(row[3] for row in rows)
    notes = (", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())),)
    return Sheet(f"Collection {result.collection}", ("model", "recipe", "repo", "verdict", "reason"), rows, notes)


def status_sheet(rows: Sequence[ReleaseStatus]) -> Sheet:
    """The state of each release, and how many there are of each state."""
    cells = tuple((row.model, row.recipe, row.state, row.detail) for row in rows)
    counts = Counter(row.state for row in rows)
    notes = (", ".join(f"{count} {state}" for state, count in counts.items()) or "no releases yet",)
    return Sheet("Releases", ("model", "recipe", "state", "detail"), cells, notes, names=frozenset({0, 3}))


def reconciliation_sheet(found: Reconciliation, file: str) -> Sheet:
    """What a collection lists otherwise than its file, what was or would be done, and what else is to do."""
    rows = tuple((change.action, change.repo_id, change.collection, change.why) for change in found.changes)
    counts = Counter(change.action for change in found.changes)
    numbers = ", ".join(f"{counts[action]} to {action}" for action in ("add", "update", "remove"))
    summary = (
        "Nothing to do: the collection lists what it should."
        if not rows
        else f"Done: {numbers}."
        if found.applied
        else f"{numbers}. Nothing was changed: fp8pipe reconcile {file} --apply"
    )
    notes = (
        *(f"Not on the Hub: {one}" for one in found.missing),
        *((f"To release what is missing: fp8pipe batch {file}",) if found.missing else ()),
        *(f"Left as it is: {one}" for one in found.kept),
        summary,
    )
    return Sheet("Reconcile", ("change", "repo", "collection", "why"), rows, notes, names=frozenset({1, 2}))


def doctor_sheet(checks: Sequence[Diagnosis]) -> Sheet:
    """What this machine can and cannot do."""
    return Sheet("Doctor", ("check", "outcome", "detail"), tuple((c.name, c.outcome, c.detail) for c in checks))


def conversion_sheet(conversion: Conversion, folder: Path) -> Sheet:
    """What was renamed and reshaped, and what that means for whoever reads the checkpoint."""
    if not conversion.changes:
        note = f"{conversion.model_id} already is {conversion.method} under current names: nothing was written"
        return Sheet("Nothing to convert", ("", ""), (), (note,))
    rows = tuple((change.what, str(change.tensors or "config.json")) for change in conversion.changes)
    notes = (
        f"{folder}: {conversion.method}, with every FP8 byte unchanged; not yet measured or gated",
        *conversion.notes,
    )
    return Sheet(f"Converted {conversion.model_id}", ("change", "tensors"), rows, notes, right=frozenset({1}))


def sensitivity_sheet(calibration: Calibration) -> Sheet:
    """The ten Linears that FP8 damages most, and those that were kept out of FP8 for that reason."""
    from fp8pipe.calibrate.sensitivity import worst_modules

    worst = worst_modules(calibration, 10)
    stem = _common_stem([name for name, _ in worst])
    rows = tuple(
        (
            name.removeprefix(stem),
            _decibels(one.output_sqnr_db),
            _decibels(one.weight_sqnr_db),
            f"{one.input_amax:.4g}",
            f"{one.input_kurtosis:.3g}",
            f"{one.input_saturation:.2%}",
        )
        for name, one in worst
    )
    layers = [(one.output_sqnr_db, name) for name, one in calibration.layers.items() if one.output_sqnr_db is not None]
    notes = [f"{len(calibration.sensitivity)} Linears in {len(calibration.layers)} layers"]
    if layers:
        notes.append(f"worst layer: {min(layers)[1]}, {_decibels(min(layers)[0])} dB over all its outputs")
    notes += _expert_notes(calibration)
    notes += [f"{n} scales not measured: {reason}" for reason, n in Counter(calibration.assumed.values()).items()]
    notes += [f"{n} without KV scales: {reason}" for reason, n in Counter(calibration.kv_absent.values()).items()]
    notes += [f"{name}: {reason}" for name, reason in calibration.kept.items()]
    notes.append("out, w: SQNR of output and weight in dB; amax, kurtosis and clipped describe the input")
    columns = (f"{stem}*" if stem else "Linear", "out dB", "w dB", "amax", "kurtosis", "clipped")
    title = f"Sensitivity of {calibration.model_id}: the {len(rows)} worst Linears by output SQNR"
    return Sheet(title, columns, rows, tuple(notes), right=frozenset(range(1, 6)))


def _expert_notes(calibration: Calibration) -> list[str]:
    """How many tokens the router gave the experts, and how many experts were shown more."""
    experts = calibration.expert_tokens
    if not experts:
        return []
    routed = [tokens.routed for tokens in experts.values()]
    least = min(experts, key=lambda name: experts[name].routed)
    notes = [f"{len(experts)} experts: the router gave each {min(routed)} to {max(routed)} tokens, fewest to {least}"]
    if topped := sum(tokens.added > 0 for tokens in experts.values()):
        notes.append(f"{topped} experts had too few tokens and were shown others, only to measure their range")
    return notes


def _common_stem(names: Sequence[str]) -> str:
    """The dotted prefix that all names share: 80 columns have no room for it in every row."""
    parents = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, parents))


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def serving_sheet(serving: Serving) -> Sheet:
    """What serves a checkpoint, on how many GPUs, and why it does not elsewhere."""
    rows, reasons = serving.table()
    columns = tuple(rows[0])
    return Sheet("What serves it", columns, tuple(tuple(row.values()) for row in rows), tuple(reasons))


def plan_sheet(plan: Plan) -> Sheet:
    """What becomes of the tensors, counted by action and reason."""
    rows = tuple(
        (row.action, row.reason, str(row.tensors), human_bytes(row.source_bytes), human_bytes(row.output_bytes))
        for row in plan.summary()
    )
    share = plan.output_bytes / plan.source_bytes
    size = f"{human_bytes(plan.source_bytes)} -> {human_bytes(plan.output_bytes)} ({share:.0%})"
    notes = (*filter(None, (plan.settings.description,)), size, *plan.notes)
    columns = ("action", "reason", "tensors", "source", "output")
    return Sheet(f"Plan {plan.model_id}, {plan.recipe}", columns, rows, notes, right=frozenset({2, 3, 4}))


def terms_lines(terms: Terms, problems: Sequence[str]) -> list[str]:
    """The source's licence, what it asks of a copy, and what is wrong with the source's card."""
    licence = terms.licence
    if licence is None:
        return [f"licence: {terms.problem}"]
    asked = (
        "" if licence.publish else f"a quantized copy may not be published: {licence.because}",
        f"the name must begin with {licence.name_prefix}" if licence.name_prefix else "",
        "a copy of its text goes along" if licence.text == "required" else "",
        "a NOTICE goes along" if licence.notice else "",
    )
    first = f"licence: {licence.title} ({terms.id})"
    return ["; ".join([first, *filter(None, asked)]), *(f"card of the source: {problem}" for problem in problems)]


def _with_error(mean: float, stderr: float | None) -> str:
    return f"{mean:.4f}" if stderr is None else f"{mean:.4f} ± {stderr:.4f}"
