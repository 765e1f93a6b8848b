"""What the gate decided, as the card and the collection note say it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fp8pipe.errors import Refused
from fp8pipe.hub.collections import MAX_NOTE
from fp8pipe.records import EvalReport, GateDecision, TaskDecision, metric_label
from fp8pipe.release.card.facts import CardFacts
from fp8pipe.release.scores import in_points, interval_of, number


def headline(decision: GateDecision) -> str:
    """The verdict in a few words. Refused for a rejected checkpoint, which gets neither card nor note."""
    if decision.verdict == "rejected":
        raise Refused(f"a rejected checkpoint has neither card nor collection note: {decision.reason}")
    return "Accepted" if decision.verdict == "accepted" else "Inconclusive, released by decision"


def verdict_lines(facts: CardFacts) -> Iterator[str]:
    """The numbers behind the verdict, one line each."""
    decision, approval = facts.decision, facts.approval
    yield "; ".join(task_sentence(task, decision.tasks) for task in decision.tasks) + "."
    engine = facts.candidate.engine
    yield f"Measured with vLLM {facts.candidate.versions.get('vllm', '?')} on {engine.device_class}."
    for tried in decision.earlier:
        yield f"Before this one, the gate rejected recipe {tried.recipe}: {tried.reason}"
    if decision.verdict == "inconclusive" and approval is not None:
        yield f"The samples do not settle the verdict; {approval.who} released it on {approval.when}: {approval.reason}"


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
