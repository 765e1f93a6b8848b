"""Rules about the samples: every metric once and finite, the same documents on both sides, as many as asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

from fp8pipe.config import PerplexityPolicy, TaskPolicy
from fp8pipe.gate.evidence import Evidence, Outcome, few, mean_of, settled, unchecked
from fp8pipe.records import EvalReport, MetricSamples, TaskResult


def metrics(evidence: Evidence) -> Outcome:
    """Every task and metric of the policy exactly once on both sides, finite, and nothing that one side alone has."""
    problems = [
        problem
        for side in (evidence.baseline, evidence.candidate)
        for name, wanted in evidence.policy.gated
        for problem in _task_problems(side, name, wanted)
    ]
    problems.extend(_one_sided_tasks(evidence))
    problems.extend(_readings(evidence))
    return settled(problems, f"{len(evidence.policy.gated)} gated metric(s): each once, finite, on both sides")


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
            f"{side.role} has {len(found) or 'no'} metrics {wanted.metric},{wanted.filter} for {name}, expected one "
            f"(there are: {present})"
        )
        return
    yield from _metric_problems(side.role, task, found[0])


def _metric_problems(role: str, task: TaskResult, metric: MetricSamples) -> Iterator[str]:
    where = f"{role} {task.task} {metric.metric}"
    if len(metric.values) != len(task.doc_ids) or not metric.values:
        yield f"{where}: {len(metric.values)} values for {len(task.doc_ids)} samples"
    if metric.weights and (len(metric.weights) != len(metric.values) or min(metric.weights) <= 0):
        yield f"{where}: {len(metric.weights)} lengths for {len(metric.values)} samples, or one without words"
        return
    bad = [i for i, value in enumerate(metric.values) if not math.isfinite(value)]
    if bad or not math.isfinite(metric.mean):
        place = f"value {metric.values[bad[0]]} at sample {bad[0]}, {len(bad)} in all" if bad else "the mean"
        yield f"{where}: not finite: {place}"
    elif metric.values:
        mean = mean_of(metric)
        if not math.isclose(mean, metric.mean, rel_tol=1e-6, abs_tol=1e-9):
            yield f"{where}: reported {metric.mean:.6g}, but its samples average {mean:.6g}; a paired test needs a mean"


def _one_sided_tasks(evidence: Evidence) -> Iterator[str]:
    ours = {task.task for task in evidence.baseline.tasks}
    theirs = {task.task for task in evidence.candidate.tasks}
    for name in sorted(ours ^ theirs):
        yield f"task {name} is only in the {'baseline' if name in ours else 'candidate'}"


def _readings(evidence: Evidence) -> Iterator[str]:
    for name, wanted, ours, theirs in evidence.gated_pairs():
        one, other = (side.samples_of(wanted.metric, wanted.filter) for side in (ours, theirs))
        if one is not None and other is not None and one.higher_is_better != other.higher_is_better:
            yield f"{name}: higher is better on one side only"
        if one is not None and other is not None and one.weights != other.weights:
            yield f"{name}: the lengths of the texts differ between the two sides"


def samples(evidence: Evidence) -> Outcome:
    """The same documents, prompts and targets, hash by hash, in the same order, none twice."""
    pairs = list(evidence.pairs())
    if not pairs:
        return unchecked("no task is on both sides")
    problems = [problem for pair in pairs for problem in _sample_problems(*pair)]
    bare = [f"{name} {kind}" for name, ours, theirs in pairs for kind in _missing_hashes(ours, theirs)]
    if bare and not problems:
        return unchecked(f"not recorded: {', '.join(bare)}")
    total = sum(len(ours.doc_ids) for _, ours, _ in pairs)
    return settled(problems, f"{total} samples, equal hash by hash: documents, prompts and targets")


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
        return f"the same documents in another order or number ({len(ours)} and {len(theirs)})"
    parts = []
    if missing:
        parts.append(f"candidate lacks {len(missing)} documents ({few(map(str, sorted(missing)))})")
    if extra:
        parts.append(f"candidate has {len(extra)} more ({few(map(str, sorted(extra)))})")
    return ", ".join(parts)


def completeness(evidence: Evidence) -> Outcome:
    """As many samples as the suite asks for at this look."""
    if evidence.suite is None:
        return unchecked("the suite was not given, so the number of samples it asks for is not known")
    share = evidence.policy.looks[evidence.look - 1]
    problems, unknown = [], []
    for name, ours, theirs in evidence.pairs():
        spec = evidence.suite.tasks.get(name)
        if spec is None:
            problems.append(f"suite {evidence.suite.name} has no task {name}")
        elif (all_of_it := spec.scored or ours.available) is None:
            unknown.append(name)
        else:
            wanted = math.ceil(all_of_it * share)
            for role, task in (("baseline", ours), ("candidate", theirs)):
                if len(task.doc_ids) != wanted:
                    problems.append(f"{name}: {role} scored {len(task.doc_ids)} samples, the suite asks for {wanted}")
    if unknown and not problems:
        return unchecked(f"neither suite nor baseline tells how many documents {few(unknown)} has")
    return settled(problems, f"every task has the samples that suite {evidence.suite.name} asks for")
