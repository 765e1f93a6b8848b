"""How the card and the plots show a metric's values."""

from __future__ import annotations

from fp8pipe.records import EvalReport, TaskDecision


def in_points(task: TaskDecision) -> bool:
    """Whether the metric is a share, shown in percent and points."""
    return 0 <= task.baseline <= 1 and 0 <= task.candidate <= 1


def number(value: float, task: TaskDecision) -> str:
    """A value of the task's metric, or a difference of two: in percent or points if the metric is a share."""
    text = f"{100 * value:.2f}" if in_points(task) else f"{value:.4g}"
    return "0.00" if text == "-0.00" else text


def interval_of(report: EvalReport, task: TaskDecision) -> tuple[float, float] | None:
    """95 % interval of one side's mean; None if the report lacks the metric, or it is not a mean (a perplexity)."""
    import numpy as np

    from fp8pipe.gate.statistics import mean_interval

    result = report.task(task.task)
    metric = result.samples_of(task.metric, task.filter) if result else None
    if metric is None or not np.isclose(np.mean(metric.values), metric.mean):
        return None
    return mean_interval(np.asarray(metric.values))
