"""The records of a release in, its model card out: Markdown with front matter, the same bytes for the same records.

    card_for_folder(folder, repo_id=...)    reads DIR/fp8pipe/ and renders; the only function here that touches files
    render_card(facts)                      pure
    collection_note(decision)               the line under the model in its collection
    summary_rows(decision, ...)             accuracy before and after, as the card's table has it

No clock: nothing here differs between two renderings, so that a republish changes no byte. Names and texts come from
configurations and from other people's repositories; all of them pass through an escaping filter on the way in.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fp8pipe.config import GatePolicy, Recipe
from fp8pipe.errors import Refused
from fp8pipe.files import write_atomically
from fp8pipe.progress import human_bytes
from fp8pipe.records import (
    RECORD_DIR,
    Approval,
    Checkpoint,
    EvalReport,
    GateDecision,
    Snapshot,
    TaskDecision,
    ValidationReport,
    metric_label,
)

if TYPE_CHECKING:
    from fp8pipe.quantize.plan import SummaryRow
    from fp8pipe.records.calibration import Calibration

MAX_NOTE = 500
"""Characters of a collection note, a limit of the Hub."""

SOURCE_CARD = f"{RECORD_DIR}/source_card.md"
"""The source's own README.md, kept because the release's card takes its name."""

EVIDENCE = {
    "gate.json": "the verdict, with every number compared and one reason per rule",
    "policy.json": "margins, alpha and limits of the gate",
    "suite.json": "tasks, shots, seeds and engine arguments of the measurement",
    "baseline.json": "the BF16 source, sample by sample",
    "candidate.json": "this checkpoint, sample by sample",
    "validation.json": "every structural check and finding",
    "plan.json": "every tensor: kept or quantized, how, why, where",
    "recipe.json": "the recipe, resolved",
    "calibration.json": "activation and KV ranges, and the samples they come from",
    "checkpoint.json": "fingerprint, source commit, sizes",
    "source.json": "the source's files with their hashes",
    "manifest.json": "sha256 of every published file",
    "approval.json": "who released an inconclusive result, when and why",
    "source_card.md": "the source's own card",
}
"""Records that a release may carry in fp8pipe/, by importance."""

PLOTS = {"drop": "Drop against the margin", "accuracy": "Accuracy per task", "flips": "Samples that changed"}
"""Titles of the plots, in the order of the card."""

_LIMIT_RULES = {"min_speedup": "speed", "max_memory_ratio": "memory"}
"""Limits of a policy on serving -> the gate's rules that hold them."""

_MARK = b"and released by fp8pipe "
"""What every card says in its first paragraph, and no source's does."""

_CARD_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Front matter that a quantized copy inherits."""


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says."""

    repo_id: str
    tag: str
    source: Snapshot
    source_card: str | None
    """The source's README.md; its front matter names the licence."""
    recipe: Recipe
    checkpoint: Checkpoint
    plan_summary: Sequence[SummaryRow]
    calibration: Calibration | None
    validation: ValidationReport
    baseline: EvalReport
    candidate: EvalReport
    decision: GateDecision
    policy: GatePolicy | None = None
    approval: Approval | None = None
    notes: Sequence[str] = ()
    """The plan's notes."""
    plots: Mapping[str, str] = field(default_factory=dict)
    """Name of the plot (see PLOTS) -> path in the repository."""
    evidence: Sequence[str] = ()
    """Names of the records in fp8pipe/."""


def card_for_folder(folder: Path, *, repo_id: str, tag: str | None = None) -> str:
    """The card of the checkpoint in `folder`, from its records; InputError names the record that is missing.

    The README.md that came with the source is kept as fp8pipe/source_card.md before the card takes its place.
    """
    from fp8pipe.quantize.plan import Plan
    from fp8pipe.records.calibration import Calibration

    records = folder / RECORD_DIR
    keep_source_card(folder)
    checkpoint, plan = Checkpoint.load(records / "checkpoint.json"), Plan.load(records / "plan.json")
    source_card, policy = folder / SOURCE_CARD, records / "policy.json"
    facts = CardFacts(
        repo_id=repo_id,
        tag=tag or checkpoint.release_tag,
        source=Snapshot.load(records / "source.json"),
        source_card=source_card.read_text(errors="replace") if source_card.is_file() else None,
        recipe=plan.settings,
        checkpoint=checkpoint,
        plan_summary=plan.summary(),
        notes=plan.notes,
        calibration=Calibration.load(records / "calibration.json") if checkpoint.calibration_digest else None,
        validation=ValidationReport.load(records / "validation.json"),
        baseline=EvalReport.load(records / "baseline.json"),
        candidate=EvalReport.load(records / "candidate.json"),
        decision=GateDecision.load(records / "gate.json"),
        policy=GatePolicy.model_validate_json(policy.read_bytes()) if policy.is_file() else None,
        approval=Approval.load_if_present(records / "approval.json"),
        plots={name: f"{RECORD_DIR}/plots/{name}.png" for name in PLOTS if (records / f"plots/{name}.png").is_file()},
        # The manifest is written after the card, which it lists.
        evidence=[name for name in EVIDENCE if name == "manifest.json" or (records / name).is_file()],
    )
    return render_card(facts)


def keep_source_card(folder: Path) -> None:
    """Put the source's README.md aside, once; a README.md of ours is none."""
    readme, kept = folder / "README.md", folder / SOURCE_CARD
    if kept.exists() or not readme.is_file():
        return
    content = readme.read_bytes()
    if _MARK not in content:
        write_atomically(kept, content)


def render_card(facts: CardFacts) -> str:
    """README.md of the release. Raises Refused for what the gate rejected, or left inconclusive and nobody approved."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    decision = facts.decision
    _refuse(decision, facts.approval)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"md": escape, "code": code, "url": _url, "fence": fence}
    template = environment.from_string((files("fp8pipe.release") / "card.md.j2").read_text())
    text = template.render(_context(facts))
    return re.sub(r"\n{3,}", "\n\n", text)


def _refuse(decision: GateDecision, approval: Approval | None) -> None:
    if decision.verdict == "rejected":
        raise Refused(f"no card for a rejected checkpoint: {decision.reason}")
    if decision.verdict == "inconclusive" and (approval is None or approval.decision != decision.digest()):
        raise Refused(f"no card for an inconclusive result without an approval of this decision: {decision.reason}")


def _context(facts: CardFacts) -> dict[str, Any]:
    """What the template names."""
    decision, candidate = facts.decision, facts.candidate
    fp8_cache = candidate.engine.kv_cache_dtype.startswith("fp8")
    return {
        "front_matter": _front_matter(facts),
        "name": facts.repo_id.rsplit("/", 1)[-1],
        "source": facts.source,
        "recipe": facts.recipe,
        "scheme": describe_scheme(facts.recipe),
        "versions": {"fp8pipe": candidate.versions.get("fp8pipe", "(version not recorded)")},
        "headline": _headline(decision),
        "verdict_lines": list(_verdict_lines(facts)),
        "on_cpu": candidate.engine.device_class == "cpu",
        "engine": candidate.engine,
        "serve_command": _serve_command(facts, fp8_cache),
        "tag": facts.tag,
        "fp8_cache": fp8_cache,
        "tested": _tested(candidate),
        "accuracy_table": markdown_table(summary_rows(decision, facts.baseline, candidate)),
        "noise": list(_noise(facts.baseline)),
        "serving_table": markdown_table(_serving_rows(facts)),
        "serving_note": _serving_note(facts),
        "serving_limits": _serving_limits(facts),
        "samples": f"{sum({task.task: task.n for task in decision.tasks}.values()):,}",
        "alpha": f"{decision.alpha_spent:.3g}",
        "alpha_note": _alpha_note(decision),
        "plots": [(title, facts.plots[name]) for name, title in PLOTS.items() if name in facts.plots],
        "scheme_rows": _scheme_rows(facts),
        "plan_table": markdown_table(_plan_rows(facts.plan_summary)),
        "notes": facts.notes,
        "calibration_rows": _calibration_rows(facts.calibration),
        "validation": facts.validation,
        "validation_line": _validation_line(facts.validation),
        "fp8pipe_commands": "\n".join(_fp8pipe_commands(facts, fp8_cache)),
        "lm_eval_commands": "\n".join(_lm_eval_commands(facts)),
        "recipe_yaml": _recipe_yaml(facts.recipe),
        "licence": _licence(facts),
        "limits": list(_limits(facts)),
        "evidence": [(f"{RECORD_DIR}/{name}", EVIDENCE[name]) for name in EVIDENCE if name in facts.evidence],
    }


# ---------------------------------------------------------------------------------------------- escaping


def escape(text: object) -> str:
    """`text` as plain words in one Markdown line, table cells included: no markup, HTML, links or line breaks."""
    line = re.sub(r"([\\`*_\[\]<|~&$])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"^([-+=>#]|\d+(?=[.)](?:\s|$)))", _escape_start, line)


def _escape_start(found: re.Match[str]) -> str:
    """What would open a list, heading or quote at the start of a line; of `1. ` it is the dot that is escaped."""
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"


def code(text: object) -> str:
    """`text` as a code span that stays one, also inside a table."""
    line = " ".join(str(text).split()) or "-"
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}".replace("|", "\\|")


def fence(text: str, language: str = "") -> str:
    """`text` as a fenced block that nothing in it can close."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _url(path: str) -> str:
    from urllib.parse import quote

    return quote(path, safe="/:._-")


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of equal keys as a Markdown table; numbers to the right."""
    if not rows:
        return ""
    columns = list(rows[0])
    numeric = [all(re.match(r"^[\d.,+\-]", row[column]) for row in rows) for column in columns]
    lines = [[escape(column) for column in columns], ["---:" if right else "---" for right in numeric]]
    lines += [[escape(row[column]) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# ---------------------------------------------------------------------------------------------- numbers


def in_points(task: TaskDecision) -> bool:
    """Whether the metric is a share, shown in percent and points."""
    return 0 <= task.baseline <= 1 and 0 <= task.candidate <= 1


def number(value: float, task: TaskDecision) -> str:
    """A value of the task's metric, or a difference of two, as people read it."""
    text = f"{100 * value:.2f}" if in_points(task) else f"{value:.4g}"
    return "0.00" if text == "-0.00" else text


def summary_rows(decision: GateDecision, baseline: EvalReport, candidate: EvalReport) -> list[dict[str, str]]:
    """One row per gated task: both accuracies with 95 % intervals, the drop with its bounds, and the verdict."""
    return [_summary_row(task, baseline, candidate) for task in decision.tasks]


def _summary_row(task: TaskDecision, baseline: EvalReport, candidate: EvalReport) -> dict[str, str]:
    found = baseline.task(task.task)
    return {
        "task": task.task,
        "metric": task.metric if task.filter == "none" else f"{task.metric}, {task.filter}",
        "shots": str(found.num_fewshot) if found else "?",
        "n": f"{task.n:,}",
        "BF16": _with_interval(task, task.baseline, baseline),
        "FP8": _with_interval(task, task.candidate, candidate),
        "drop": f"{number(task.drop, task)} ({number(task.drop_lower, task)} to {number(task.drop_upper, task)})",
        "margin": number(task.margin, task),
        "recovery %": f"{100 * task.recovery:.2f}" if task.recovery is not None else "n/a",
        "verdict": task.verdict,
    }


def _with_interval(task: TaskDecision, mean: float, report: EvalReport) -> str:
    interval = interval_of(report, task)
    if interval is None:
        return number(mean, task)
    return f"{number(mean, task)} ({number(interval[0], task)} to {number(interval[1], task)})"


def interval_of(report: EvalReport, task: TaskDecision) -> tuple[float, float] | None:
    """95 % interval of one side's mean; None where the report lacks the metric, or it is no mean."""
    import numpy as np

    from fp8pipe.gate.statistics import mean_interval

    result = report.task(task.task)
    metric = result.samples_of(task.metric, task.filter) if result else None
    if metric is None or not np.isclose(np.mean(metric.values), metric.mean):
        return None  # no mean: a perplexity
    return mean_interval(np.asarray(metric.values))


# ---------------------------------------------------------------------------------------------- verdict


def task_sentence(task: TaskDecision, among: Sequence[TaskDecision]) -> str:
    """`qa: 91.00 -> 90.60, drop 0.40 points (-0.26 to 1.06), margin 2.00, n=2,000`."""
    unit = " points" if in_points(task) else ""
    return (
        f"{metric_label(task, among)}: {number(task.baseline, task)} -> {number(task.candidate, task)}, "
        f"drop {number(task.drop, task)}{unit} ({number(task.drop_lower, task)} to {number(task.drop_upper, task)}), "
        f"margin {number(task.margin, task)}, n={task.n:,}"
    )


def _headline(decision: GateDecision) -> str:
    return "Accepted" if decision.verdict == "accepted" else "Inconclusive, released by decision"


def _verdict_lines(facts: CardFacts) -> Iterator[str]:
    decision, approval = facts.decision, facts.approval
    yield "; ".join(task_sentence(task, decision.tasks) for task in decision.tasks) + "."
    engine = facts.candidate.engine
    yield f"Measured with vLLM {facts.candidate.versions.get('vllm', '?')} on {engine.device_class}."
    for tried in decision.earlier:
        yield f"Before it, the gate rejected recipe {tried.recipe}: {tried.reason}"
    if decision.verdict == "inconclusive" and approval is not None:
        yield f"The samples do not settle it; released by {approval.who} on {approval.when}: {approval.reason}"


def _alpha_note(decision: GateDecision) -> str:
    shares = decision.looks * decision.max_attempts
    if shares == 1:
        return ""
    return (
        f" ({decision.alpha:g} divided over {decision.looks} look(s) and {decision.max_attempts} attempt(s); "
        f"this is look {decision.look} of attempt {decision.attempt})"
    )


def collection_note(decision: GateDecision) -> str:
    """What the collection says under the model, at most 500 characters. Raises Refused for a rejected one."""
    if decision.verdict == "rejected":
        raise Refused(f"no collection note for a rejected checkpoint: {decision.reason}")
    ending = " Measured on CPU with reference kernels, no GPU verdict." if decision.device_class == "cpu" else ""
    ending = ending or f" Measured on {decision.device_class}."
    note = f"{_headline(decision)}."
    for index, task in enumerate(decision.tasks):
        sentence = f" {task_sentence(task, decision.tasks)}."
        left = len(decision.tasks) - index
        more = f" {left} more task(s) in the card."
        after = len(more) if left > 1 else 0
        if len(note) + len(sentence) + after + len(ending) > MAX_NOTE:
            return (note + more + ending)[:MAX_NOTE]
        note += sentence
    return (note + ending)[:MAX_NOTE]


# ---------------------------------------------------------------------------------------------- sections


_WEIGHTS = {"tensor": "one scale per tensor", "channel": "one scale per output channel", "block": "one scale per block"}
_ACTIVATIONS = {
    ("static", "tensor"): "FP8 E4M3, calibrated, one scale per tensor",
    ("dynamic", "tensor"): "FP8 E4M3, scaled as they come, one scale per tensor",
    ("dynamic", "token"): "FP8 E4M3, scaled as they come, one scale per token",
    ("dynamic", "group"): "FP8 E4M3, scaled as they come, one scale per group of 128",
}


def describe_scheme(recipe: Recipe) -> str:
    """Weights, activations and KV cache in one line."""
    return f"weights {_weights(recipe)}; activations {_activations(recipe)}; KV cache {_kv_cache(recipe)}"


def _weights(recipe: Recipe) -> str:
    block = "x".join(map(str, recipe.weights.block_shape)) if recipe.weights.strategy == "block" else ""
    return f"FP8 {recipe.weights.format.upper()}, {_WEIGHTS[recipe.weights.strategy]} {block}".rstrip()


def _activations(recipe: Recipe) -> str:
    acts = recipe.activations
    return "not quantized" if acts is None else _ACTIVATIONS[acts.mode, acts.strategy]


def _kv_cache(recipe: Recipe) -> str:
    if recipe.kv_cache is None:
        return "not quantized"
    return f"FP8 E4M3, calibrated, one scale per {'layer' if recipe.kv_cache.strategy == 'tensor' else 'KV head'}"


def _scheme_rows(facts: CardFacts) -> list[tuple[str, str]]:
    made, source = facts.checkpoint, facts.source
    ratio = 100 * made.output_bytes / made.source_bytes
    return [
        ("source", f"{source.model_id} at {source.commit}"),
        ("weights", _weights(facts.recipe)),
        ("activations", _activations(facts.recipe)),
        ("KV cache", _kv_cache(facts.recipe)),
        ("format", facts.recipe.checkpoint_format),
        ("size", f"{human_bytes(made.source_bytes)} -> {human_bytes(made.output_bytes)} ({ratio:.1f} %)"),
        ("tensors", f"{made.quantized_tensors} quantized, {made.kept_tensors} kept"),
        ("fingerprint", made.fingerprint),
    ]


def _recipe_yaml(recipe: Recipe) -> str:
    """The recipe as a file that can be used again, without a path of the machine that used it."""
    content = recipe.model_dump(mode="json")
    content["calibration"]["dataset"] = dataset_name(recipe.calibration.dataset)
    if not recipe.needs_calibration:
        del content["calibration"]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _plan_rows(summary: Sequence[SummaryRow]) -> list[dict[str, str]]:
    return [
        {
            "action": row.action,
            "what": row.reason,
            "tensors": str(row.tensors),
            "before": human_bytes(row.source_bytes),
            "after": human_bytes(row.output_bytes),
        }
        for row in summary
    ]


def _calibration_rows(calibration: Calibration | None) -> list[tuple[str, str]]:
    if calibration is None:
        return []
    return [
        ("dataset", dataset_name(calibration.dataset)),
        ("revision", calibration.dataset_revision),
        ("split", calibration.dataset_split),
        ("samples", f"{len(calibration.sample_indices):,}, {calibration.tokens:,} tokens"),
        ("longest sample", f"{calibration.max_seq_len:,} tokens"),
        ("seed", str(calibration.seed)),
        ("sha256 of the token ids", calibration.token_ids_sha256),
    ]


def is_path(dataset: str) -> bool:
    """Whether a dataset is a file of the machine that calibrated, not a name on the Hub."""
    return dataset.startswith((".", "/", "~")) or bool(re.search(r"\.(jsonl?|parquet|txt)$", dataset))


def dataset_name(dataset: str) -> str:
    """What the public may know of a dataset: its id, or the file's own name."""
    return Path(dataset).name if is_path(dataset) else dataset


def _tested(report: EvalReport) -> list[tuple[str, str]]:
    engine = report.engine
    rows = [
        ("vLLM", report.versions.get("vllm", "not recorded")),
        ("device", f"{engine.device_class} ({engine.device_name})"),
        ("Linear kernels", ", ".join(engine.linear_kernels) or "not recorded"),
        ("attention", engine.attention_backend),
        ("KV cache dtype", engine.kv_cache_dtype),
        ("other dtype", engine.dtype),
        ("context", f"{engine.max_model_len:,} tokens"),
        ("chat template", "applied" if report.chat_template_hash else "not applied"),
        ("beginning-of-sequence token", "added" if report.add_bos_token else "not added"),
    ]
    rows += [(name, report.versions[name]) for name in ("lm_eval", "transformers", "torch") if name in report.versions]
    return rows


def _noise(baseline: EvalReport) -> Iterator[str]:
    """The engine's own flip rate, metric by metric."""
    for flip in baseline.flips:
        share = f"{flip.flipped:,} of {flip.n:,} ({100 * flip.rate:.2f} %)"
        yield f"{flip.task}, {flip.metric} ({flip.filter}): {share}"


def _serving_rows(facts: CardFacts) -> list[dict[str, str]]:
    """Speed and memory of both sides; empty unless both were timed on the same workload."""
    sides = (facts.baseline, facts.candidate)
    one, other = (side.serving for side in sides)
    if one is None or other is None or one.workload != other.workload:
        return []
    rows = [
        ("requests per second", one.request_throughput, other.request_throughput),
        ("generated tokens per second", one.output_throughput, other.output_throughput),
        ("prompt and generated tokens per second", one.total_token_throughput, other.total_token_throughput),
        ("time to first token, median, ms", one.median_ttft_ms, other.median_ttft_ms),
        ("time to first token, 99 %, ms", one.p99_ttft_ms, other.p99_ttft_ms),
        ("between tokens, median, ms", one.median_itl_ms, other.median_itl_ms),
        ("between tokens, 99 %, ms", one.p99_itl_ms, other.p99_itl_ms),
    ]
    memory = [side.engine.model_bytes for side in sides]
    if memory[0] and memory[1]:
        rows.append(("weights in memory, MB", memory[0] / 1e6, memory[1] / 1e6))
    return [
        {"": name, "BF16": f"{before:,.1f}", "FP8": f"{after:,.1f}", "ratio": f"{after / before:.2f}"}
        for name, before, after in rows
    ]


def _serving_note(facts: CardFacts) -> str:
    figures = facts.candidate.serving
    if figures is None:
        return ""
    asked = figures.workload
    said = (
        f"vLLM's benchmark: {asked['num_prompts']} random prompts of {asked['input_len']} tokens, "
        f"{asked['output_len']} tokens generated for each, {asked['max_concurrency']} at a time."
    )
    return said if figures.comparable else f"{said} Taken on a CPU: not comparable with any GPU, nor BF16 with FP8."


def _serving_limits(facts: CardFacts) -> list[str]:
    """What the gate said of the policy's limits on speed and memory."""
    rules = {rule.rule: rule for rule in facts.decision.rules}
    limited = facts.policy.serving_limits if facts.policy is not None else ()
    found = [rules[_LIMIT_RULES[name]] for name in limited if _LIMIT_RULES[name] in rules]
    return [f"The gate's limit on {rule.rule}: {rule.outcome}, {rule.reason}." for rule in found]


def _validation_line(validation: ValidationReport) -> str:
    found = len(validation.warnings)
    return (
        f"{len(validation.checks)} checks over {validation.tensors} tensors, depth {validation.depth}: no error, "
        + ("no warning." if not found else f"{found} warning{'s' if found > 1 else ''}:")
    )


def _limits(facts: CardFacts) -> Iterator[str]:
    decision, engine = facts.decision, facts.candidate.engine
    if engine.device_class == "cpu":
        yield "Measured on a CPU. Measure it again on the GPU that will serve it before relying on the numbers."
    else:
        yield f"Measured on {engine.device_class} only; kernels differ between device classes."
    if facts.recipe.activations is not None:
        yield "Below compute capability 8.9 vLLM keeps the weights in FP8 but computes in 16 bits; not measured."
    if facts.recipe.kv_cache is not None:
        yield "Without --kv-cache-dtype fp8 the cache keeps the model's dtype; not measured."
    names = ", ".join(dict.fromkeys(task.task for task in decision.tasks))
    yield f"Accuracy is known for {names} within {engine.max_model_len:,} tokens of context; nothing else was measured."
    if decision.unchecked:
        yield f"Rules of the gate that could not be checked: {', '.join(decision.unchecked)}."
    if facts.checkpoint.zero_units:
        count = len(facts.checkpoint.zero_units)
        yield f"{count} scale unit(s) hold only zeros, first {facts.checkpoint.zero_units[0]}."


# ---------------------------------------------------------------------------------------------- commands


def shell(*words: str) -> str:
    """A command line that a shell reads back as `words`."""
    return " ".join(shlex.quote(" ".join(word.split())) for word in words)


def _serve_command(facts: CardFacts, fp8_cache: bool) -> str:
    cache = ("--kv-cache-dtype", "fp8") if fp8_cache else ()
    return shell("vllm", "serve", facts.repo_id, "--revision", facts.tag, *cache)


def _fp8pipe_commands(facts: CardFacts, fp8_cache: bool) -> Iterator[str]:
    source = facts.source.model_id if facts.source.is_local else f"{facts.source.model_id}@{facts.source.commit}"
    recipe, suite, policy = facts.recipe.name, facts.candidate.suite, facts.decision.policy
    cache = ("--kv-cache-dtype", "fp8") if fp8_cache else ()
    yield shell("fp8pipe", "quantize", source, "--recipe", recipe, "--output", "checkpoint")
    yield shell("fp8pipe", "validate", "checkpoint", "--source", source)
    yield shell("fp8pipe", "evaluate", source, "--suite", suite, "--output", "baseline")
    yield shell("fp8pipe", "evaluate", "checkpoint", "--suite", suite, "--output", "candidate", *cache)
    yield shell("fp8pipe", "gate", "baseline", "candidate", "--policy", policy, "--checkpoint", "checkpoint")


def _lm_eval_commands(facts: CardFacts) -> Iterator[str]:
    """One command per number of shots, since lm-eval takes one for all its tasks."""
    report = facts.candidate
    on_cpu = report.engine.device_class == "cpu"
    program = ("python", "-m", "fp8pipe.evaluate.lm_eval") if on_cpu else ("lm_eval",)
    template = ("--apply_chat_template",) if report.chat_template_hash else ()
    gated = {task.task for task in facts.decision.tasks}
    tasks = sorted(
        (task for task in report.tasks if task.task in gated), key=lambda task: (task.num_fewshot, task.task)
    )
    for shots, group in groupby(tasks, key=lambda task: task.num_fewshot):
        names = ",".join(task.task for task in group)
        chosen = ("--tasks", names, "--num_fewshot", str(shots), "--batch_size", "auto")
        yield shell(*program, "run", "--model", "vllm", "--model_args", _model_args(facts), *chosen, *template)


def _model_args(facts: CardFacts) -> str:
    report = facts.candidate
    known = {"pretrained": facts.repo_id, "revision": facts.tag, "add_bos_token": report.add_bos_token}
    simple = {k: v for k, v in sorted(report.engine.arguments.items()) if isinstance(v, str | int | float)}
    owned = {"model", "tokenizer", "kv_cache_dtype", *known, *(_cpu_defaults() if report.engine.plugin else ())}
    cache = {"kv_cache_dtype": report.engine.kv_cache_dtype} if report.engine.kv_cache_dtype != "auto" else {}
    kept = {key: value for key, value in simple.items() if key not in owned}
    return ",".join(f"{key}={value}" for key, value in (known | kept | cache).items())


def _cpu_defaults() -> tuple[str, ...]:
    """Arguments that `python -m fp8pipe.evaluate.lm_eval` gives by itself."""
    from fp8pipe.evaluate.environment import CPU_ENGINE_ARGUMENTS

    return tuple(CPU_ENGINE_ARGUMENTS)


# ---------------------------------------------------------------------------------------------- front matter, licence


def card_metadata(card: str | None) -> dict[str, Any]:
    """The front matter of somebody's README.md that a copy inherits; empty where there is none or it is not YAML."""
    found = re.match(r"\A\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", card or "", re.DOTALL)
    if found is None:
        return {}
    try:
        content = yaml.safe_load(found.group(1))
    except yaml.YAMLError:  # somebody else's card; what it does not say clearly, ours does not repeat
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: content[key] for key in _CARD_KEYS if _is_text(content.get(key))}


def _is_text(value: object) -> bool:
    listed = value if isinstance(value, list) else [value]
    return bool(listed) and all(isinstance(item, str) and item.strip() for item in listed)


def _front_matter(facts: CardFacts) -> str:
    """YAML between the dashes, as the Hub's own client spells it."""
    from huggingface_hub import EvalResult, ModelCardData

    inherited = card_metadata(facts.source_card)
    results = [
        EvalResult(
            task_type="text-generation",
            task_name=task.task,
            dataset_type=task.task,
            dataset_name=task.task,
            metric_type=task.metric,
            metric_value=round(task.candidate, 4),
            metric_name=f"{task.metric} ({task.filter})",
        )
        for task in facts.decision.tasks
    ]
    base = {} if facts.source.is_local else {"base_model": facts.source.model_id, "base_model_relation": "quantized"}
    calibration = facts.calibration
    on_hub = calibration is not None and not is_path(calibration.dataset)
    # Any: the constructor's keywords have many types
    inherited_or_own: dict[str, Any] = {"pipeline_tag": "text-generation"} | inherited | base
    data = ModelCardData(
        library_name="vllm",
        tags=["fp8", "vllm", *_format_tags(facts.recipe), "fp8pipe"],
        datasets=[calibration.dataset] if calibration is not None and on_hub else None,
        model_name=facts.repo_id.rsplit("/", 1)[-1],
        eval_results=results,
        **inherited_or_own,
    )
    return data.to_yaml(line_break="\n").rstrip()


def _format_tags(recipe: Recipe) -> tuple[str, ...]:
    width = "w8a16" if recipe.activations is None else "w8a8"
    return (width, "compressed-tensors") if recipe.checkpoint_format == "compressed-tensors" else (width,)


def _licence(facts: CardFacts) -> str:
    known = card_metadata(facts.source_card)
    source = f"{facts.source.model_id} at {facts.source.commit}"
    if "license" not in known:
        return f"A copy of {source}, whose card names no licence: ask its owners before you use it."
    named = f" ({known['license_name']})" if "license_name" in known else ""
    link = f", {known['license_link']}" if "license_link" in known else ""
    return f"A copy of {source}, under that model's licence: {known['license']}{named}{link}."
