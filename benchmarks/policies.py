"""What the shipped policies require of the shipped suites: `python -m benchmarks.policies` writes the tables in docs/.

The figures are planned, not measured; `fp8pipe plan-eval` reports the same for one policy.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.page import put, table
from fp8pipe import stages
from fp8pipe.config import load_policy, load_suite, shipped
from fp8pipe.gate.evaluation_plan import EvalPlan

DOCS = Path(__file__).parent.parent / "docs"
GATE, EVALUATION = "Shipped policies", "Documents of the shipped suites"

POLICIES_TEXT = """\
Each policy is planned on the suite of the same name, with one look and one attempt at alpha 0.05. Power is the
probability that an undamaged model is accepted. The figure after a policy's name is that of all its metrics together,
which must reach 80 %. What a row assumes is set in the policy as `discordance`, `spread` or `design_effect`. The first
evaluations of a model show whether the assumption holds, and a baseline scored twice (`repeat`) shows how much of it is
the engine's own noise."""

DOCUMENTS_TEXT = """\
A suite states how many documents its tasks have, so that planning needs no data. A dataset with another number of
documents or sub-tasks is refused before an engine starts, and the gate's rule `completeness` requires exactly as many
samples. WikiText's documents are pages; `needle`, `hops` and `arrows` generate as many as the suite requests."""


@functools.cache
def plan_of(name: str) -> EvalPlan:
    """The shipped policy on the suite of its name."""
    with tempfile.TemporaryDirectory() as folder:
        return stages.plan_evaluation(load_policy(name), load_suite(name), Path(folder))


def policies() -> str:
    """One row per gated metric."""
    head = ("policy", "task", "metric", "n", "assumed of an undamaged model", "margin", "power, %")
    return (
        f"{POLICIES_TEXT}\n\n{table(head, [row for name in shipped('gates') for row in _policy_rows(plan_of(name))])}"
    )


def _policy_rows(plan: EvalPlan) -> Iterator[tuple[str, ...]]:
    for task in plan.tasks:
        metric = task.metric if task.filter == "none" else f"{task.metric}, {task.filter}"
        margin = f"{task.shown(task.margin)} {task.unit}"
        together = f"`{plan.policy}` {100 * plan.acceptance:.1f}" if task is plan.tasks[0] else ""
        yield together, task.task, metric, f"{task.samples:,}", task.assumes, margin, f"{100 * task.power:.1f}"


def documents() -> str:
    """One row per task of a suite."""
    head = ("suite", "task", "shots", "documents", "sub-tasks", "margin")
    return f"{DOCUMENTS_TEXT}\n\n{table(head, [row for name in shipped('suites') for row in _task_rows(name)])}"


def _task_rows(name: str) -> Iterator[tuple[str, ...]]:
    plan = plan_of(name)
    margins = {task.task: f"{task.shown(task.margin)} {task.unit}" for task in plan.tasks}
    for index, (task, spec) in enumerate(load_suite(name).tasks.items()):
        all_of = f" of {spec.documents:,}" if spec.samples and spec.documents else ""
        count = f"{spec.scored:,}{all_of}" if spec.scored else "all"
        subtasks = str(spec.subtasks or "")
        yield "" if index else f"`{name}`", task, str(spec.num_fewshot), count, subtasks, margins.get(task, "not gated")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder with gate.md and evaluation.md")
    folder = parser.parse_args(arguments).docs
    put(folder / "gate.md", GATE, policies())
    put(folder / "evaluation.md", EVALUATION, documents())


if __name__ == "__main__":
    main()
