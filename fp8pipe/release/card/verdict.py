"""What the gate decided, as the card and the collection note say it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fp8pipe.errors import Refused
from fp8pipe.hub.collections import MAX_NOTE
from fp8pipe.records import EvalReport, GateDecision, TaskDecision, metric_label
from fp8pipe.records.published import PublishedScore
from fp8pipe.release.card.facts import CardFacts
from fp8pipe.release.card.published import published_for
from fp8pipe.release.scores import in_points, interval_of, number

SPELLED_OUT = 2
"""Tasks whose numbers the first lines of a card give; more than that are in its tables."""


def headline(decision: GateDecision) -> str:
    """The verdict in a few words. Refused for a rejected checkpoint, which gets neither card nor note."""
    if decision.verdict == "rejected":
        raise Refused(f"a rejected checkpoint has neither card nor collection note: {decision.reason}")
    return "Accepted" if decision.verdict == "accepted" else "Inconclusive, released by decision"


def verdict_lines(facts: CardFacts) -> Iterator[str]:
    """The numbers behind the verdict, one line each."""
    decision, approval = facts.decision, facts.approval
    yield _in_short(decision)
    engine = facts.candidate.engine
    yield f"Measured with vLLM {facts.candidate.versions.get('vllm', '?')} on {engine.device_class}."
    for tried in decision.earlier:
        yield f"Before this one, the gate rejected recipe {tried.recipe}: {tried.reason}"
    if decision.verdict == "inconclusive" and approval is not None:
        yield f"The samples do not settle the verdict; {approval.who} released it on {approval.when}: {approval.reason}"


def _in_short(decision: GateDecision) -> str:
    """Every task of a few, and of many the one that came closest to its margin."""
    if len(decision.tasks) <= SPELLED_OUT:
        return "; ".join(task_sentence(task, decision.tasks) for task in decision.tasks) + "."
    closest = max(decision.tasks, key=lambda task: task.drop_upper - task.margin)
    return f"Of {len(decision.tasks)} tests, this came closest to its margin: {task_sentence(closest, decision.tasks)}."


def task_sentence(task: TaskDecision, among: Sequence[TaskDecision]) -> str:
    """`qa: 91.00 -> 90.60, drop 0.40 points (-0.26 to 1.06), margin 2.00, n=2,000`."""
    unit = " points" if in_points(task) else ""
    return (
        f"{metric_label(task, among)}: {number(task.baseline, task)} -> {number(task.candidate, task)}, "
        f"drop {number(task.drop, task)}{unit} ({number(task.drop_lower, task)} to {number(task.drop_upper, task)}), "
        f"margin {number(task.margin, task)}, n={task.n:,}"
    )


def alpha_note(decision: GateDecision) -> str:
    """How alpha was divided; empty if it was not."""
    shares = decision.looks * decision.max_attempts
    if shares == 1:
        return ""
    return (
        f" ({decision.alpha:g} divided over {decision.looks} look(s) and {decision.max_attempts} attempt(s); "
        f"this is look {decision.look} of attempt {decision.attempt})"
    )


def recovery_sentence(decision: GateDecision) -> str:
    """How much of the baseline's score is left, in one sentence; empty if no metric is a share."""
    shares = _shares(decision)
    if not shares:
        return ""
    before, after = _averages(shares)
    over = metric_label(shares[0], decision.tasks) if len(shares) == 1 else f"{len(shares)} scores on average"
    return f"It keeps {100 * after / before:.2f} % of the BF16 model's score ({over}: {before:.2f} → {after:.2f})."


def _shares(decision: GateDecision) -> list[TaskDecision]:
    """The metrics whose average means something, and whose baseline is not zero."""
    return [task for task in decision.tasks if in_points(task) and task.baseline > 0 and task.recovery is not None]


def _averages(tasks: Sequence[TaskDecision]) -> tuple[float, float]:
    """Mean of the scores of both sides, in percent."""
    before, after = (sum(side) for side in zip(*((task.baseline, task.candidate) for task in tasks), strict=True))
    return 100 * before / len(tasks), 100 * after / len(tasks)


def summary_rows(
    decision: GateDecision,
    baseline: EvalReport,
    candidate: EvalReport,
    published: Sequence[PublishedScore] = (),
) -> list[dict[str, str]]:
    """One row per gated task: both scores with 95 % intervals, what is left, and what others publish of the source;
    below them the average, if there are several. Few columns, so that a laptop shows all without scrolling."""
    rows = [_summary_row(task, decision.tasks, baseline, candidate, published) for task in decision.tasks]
    if len(shares := _shares(decision)) > 1:
        before, after = _averages(shares)
        fields = {"task": "average", "BF16": f"{before:.2f}", "FP8": f"{after:.2f}"}
        rows.append(dict.fromkeys(rows[0], "") | fields | {"recovery": f"{100 * after / before:.2f} %"})
    if not any(row["published"] for row in rows):
        for row in rows:
            del row["published"]
    return rows


def _summary_row(
    task: TaskDecision,
    among: Sequence[TaskDecision],
    baseline: EvalReport,
    candidate: EvalReport,
    published: Sequence[PublishedScore],
) -> dict[str, str]:
    return {
        "task": metric_label(task, among),
        "published": ", ".join(map(_as_published, published_for(task, published))),
        "BF16": _with_interval(task, task.baseline, baseline),
        "FP8": _with_interval(task, task.candidate, candidate),
        "recovery": f"{100 * task.recovery:.2f} %" if task.recovery is not None else "n/a",
    }


def comparison_rows(decision: GateDecision, baseline: EvalReport) -> list[dict[str, str]]:
    """One row per gated task: what was measured, and the drop with one-sided bounds beside its margin."""
    return [
        {
            "task": f"{task.task}: {_measured(task, baseline)}",
            "n": f"{task.n:,}",
            "drop": f"{number(task.drop, task)} ({number(task.drop_lower, task)} to {number(task.drop_upper, task)})",
            "margin": number(task.margin, task),
            "verdict": task.verdict,
        }
        for task in decision.tasks
    ]


def _measured(task: TaskDecision, report: EvalReport) -> str:
    """The metric, its filter and the shots."""
    found = report.task(task.task)
    shots = f"{found.num_fewshot}-shot" if found is not None else ""
    return ", ".join(filter(None, (task.metric, "" if task.filter == "none" else task.filter, shots)))


def _as_published(score: PublishedScore) -> str:
    """In percent if it may be a share."""
    value = 100 * score.value if 0 < score.value <= 1 else score.value
    return f"{value:.4g} {score.metric}".strip()


def _with_interval(task: TaskDecision, mean: float, report: EvalReport) -> str:
    interval = interval_of(report, task)
    if interval is None:
        return number(mean, task)
    return f"{number(mean, task)} ({number(interval[0], task)} to {number(interval[1], task)})"


def collection_note(decision: GateDecision) -> str:
    """The line under the model in its collection, at most `MAX_NOTE` characters. Refused for a rejected checkpoint."""
    on_cpu = decision.device_class == "cpu"
    device = "a CPU with reference kernels, no GPU verdict" if on_cpu else decision.device_class
    ending = f" Measured on {device}."
    note = f"{headline(decision)}."
    for index, task in enumerate(decision.tasks):
        sentence = f" {task_sentence(task, decision.tasks)}."
        left = len(decision.tasks) - index
        more = f" {left} more task(s) in the card."
        after = len(more) if left > 1 else 0
        if len(note) + len(sentence) + after + len(ending) > MAX_NOTE:
            return (note + more + ending)[:MAX_NOTE]
        note += sentence
    return (note + ending)[:MAX_NOTE]
