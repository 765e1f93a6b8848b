"""Rules about the samples: each metric once and finite, the same documents on both sides, as many as requested."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

from fp8pipe.config import PerplexityPolicy, TaskPolicy, look_sizes
from fp8pipe.gate.rules.pair import Pair, Ruling, few, mean_of, settled, unchecked
from fp8pipe.records import EvalReport, MetricSamples, TaskResult


def metrics(pair: Pair) -> Ruling:
    """Each gated metric is on both sides exactly once, finite, and the mean of its samples. No task is one-sided."""
    problems = [
        problem
        for side in (pair.baseline, pair.candidate)
        for name, wanted in pair.policy.gated
        for problem in _task_problems(side, name, wanted)
    ]
    problems.extend(_one_sided_tasks(pair))
    problems.extend(_direction_and_weight_problems(pair))
    return settled(problems, f"{len(pair.policy.gated)} gated metric(s): each once, finite, on both sides")


def _task_problems(side: EvalReport, name: str, wanted: TaskPolicy | PerplexityPolicy) -> Iterator[str]:
    count = sum(task.task == name for task in side.tasks)
    task = side.task(name)
    if task is None:
        yield f"{side.role} has {count or 'no'} results for task {name}, expected one"
        return
    found = [m for m in task.metrics if (m.metric, m.filter) == (wanted.metric, wanted.filter)]
    if len(found) != 1:
        present = ", ".join(sorted(f"{m.metric},{m.filter}" for m in task.metrics)) or "none"
        yield (
            f"{side.role} has {len(found) or 'no'} results for {name} {wanted.metric},{wanted.filter}, expected one "
            f"(found: {present})"
        )
        return
    yield from _metric_problems(side.role, task, found[0])


def _metric_problems(role: str, task: TaskResult, metric: MetricSamples) -> Iterator[str]:
    where = f"{role} {task.task} {metric.metric}"
    if len(metric.values) != len(task.doc_ids) or not metric.values:
        yield f"{where}: {len(metric.values)} values for {len(task.doc_ids)} samples"
    if metric.weights and (len(metric.weights) != len(metric.values) or min(metric.weights) <= 0):
        found = f"{len(metric.weights)}, the smallest {min(metric.weights):g}"
        yield f"{where}: expected {len(metric.values)} positive lengths, found {found}"
        return
    bad = [i for i, value in enumerate(metric.values) if not math.isfinite(value)]
    if bad or not math.isfinite(metric.mean):
        place = f"{len(bad)} values, the first {metric.values[bad[0]]} at sample {bad[0]}" if bad else "the mean"
        yield f"{where}: not finite: {place}"
    elif metric.values:
        mean = mean_of(metric)
        if not math.isclose(mean, metric.mean, rel_tol=1e-6, abs_tol=1e-9):
            yield (
                f"{where}: the report says {metric.mean:.6g}, but the samples average {mean:.6g}; "
                "only the mean of samples can be tested pair by pair"
            )


def _one_sided_tasks(pair: Pair) -> Iterator[str]:
    ours = {task.task for task in pair.baseline.tasks}
    theirs = {task.task for task in pair.candidate.tasks}
    for name in sorted(ours ^ theirs):
        yield f"task {name} is only in the {'baseline' if name in ours else 'candidate'}"


def _direction_and_weight_problems(pair: Pair) -> Iterator[str]:
    for name, wanted, ours, theirs in pair.metrics():
        one, other = (side.samples_of(wanted.metric, wanted.filter) for side in (ours, theirs))
        if one is not None and other is not None and one.higher_is_better != other.higher_is_better:
            yield f"{name}: higher is better on one side only"
        if one is not None and other is not None and one.weights != other.weights:
            yield f"{name}: the lengths of the texts differ between the two sides"


def samples(pair: Pair) -> Ruling:
    """Both sides scored the same documents, prompts and targets, compared by hash, in one order, none twice."""
    tasks = list(pair.tasks())
    if not tasks:
        return unchecked("the sides have no gated task in common")
    problems = [problem for task in tasks for problem in _sample_problems(*task)]
    bare = [f"{name} {kind}" for name, ours, theirs in tasks for kind in _missing_hashes(ours, theirs)]
    if bare and not problems:
        return unchecked(f"not recorded: {', '.join(bare)}")
    total = sum(len(ours.doc_ids) for _, ours, _ in tasks)
    return settled(problems, f"the documents, prompts and targets of all {total} samples have equal hashes")


_HASHES: dict[str, Callable[[TaskResult], tuple[str, ...]]] = {
    "document hashes": lambda task: task.doc_hashes,
    "prompt hashes": lambda task: task.prompt_hashes,
    "target hashes": lambda task: task.target_hashes,
}


def _missing_hashes(ours: TaskResult, theirs: TaskResult) -> list[str]:
    return [kind for kind, pick in _HASHES.items() if not pick(ours) or not pick(theirs)]


def _sample_problems(name: str, ours: TaskResult, theirs: TaskResult) -> Iterator[str]:
    for role, task in (("baseline", ours), ("candidate", theirs)):
        repeated = [str(i) for i, count in Counter(task.doc_ids).items() if count > 1]
        if repeated:
            yield f"{name}: {role} scored documents {few(repeated)} more than once"
    if ours.doc_ids != theirs.doc_ids:
        yield f"{name}: {_how_documents_differ(ours.doc_ids, theirs.doc_ids)}"
        return
    for kind, pick in _HASHES.items():
        one, other = pick(ours), pick(theirs)
        if not one or not other:
            continue
        if {len(one), len(other)} != {len(ours.doc_ids)}:
            yield f"{name}: {len(one)} and {len(other)} {kind} for {len(ours.doc_ids)} samples"
            continue
        changed = [str(doc) for doc, a, b in zip(ours.doc_ids, one, other, strict=True) if a != b]
        if changed:
            yield f"{name}: {kind} differ for {len(changed)} samples, documents {few(changed)}"
    if ours.clusters != theirs.clusters or len(ours.clusters) not in (0, len(ours.doc_ids)):
        yield f"{name}: samples are clustered differently on the two sides"


def _how_documents_differ(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    missing, extra = set(ours) - set(theirs), set(theirs) - set(ours)
    if not missing and not extra:
        return f"the same documents, but in another order or repeated ({len(ours)} and {len(theirs)} samples)"
    parts = []
    if missing:
        parts.append(f"the candidate lacks {len(missing)} documents ({few(map(str, sorted(missing)))})")
    if extra:
        parts.append(f"the candidate has {len(extra)} others ({few(map(str, sorted(extra)))})")
    return ", ".join(parts)


def completeness(pair: Pair) -> Ruling:
    """Both sides scored as many samples as the suite requests at this look."""
    if pair.suite is None:
        return unchecked("no suite was given, so the number of samples to expect is unknown")
    problems, unknown = [], []
    for name, ours, theirs in pair.tasks():
        spec = pair.suite.tasks.get(name)
        if spec is None:
            problems.append(f"suite {pair.suite.name} has no task {name}")
        elif (total := spec.scored or ours.available) is None:
            unknown.append(name)
        else:
            wanted = look_sizes(total, pair.policy.looks)[pair.look - 1]
            for role, task in (("baseline", ours), ("candidate", theirs)):
                if len(task.doc_ids) != wanted:
                    problems.append(f"{name}: {role} scored {len(task.doc_ids)} samples, the suite requests {wanted}")
    if unknown and not problems:
        return unchecked(
            f"neither the suite nor the baseline records how many documents these tasks have: {few(unknown)}"
        )
    return settled(problems, f"every task has as many samples as suite {pair.suite.name} requests")
