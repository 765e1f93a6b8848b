"""lm-eval's results as TaskResults: sample by sample, in the order of the picks, checked against what was asked for.

In: what `simple_evaluate` returned, the LoadedTask that it scored, and which generations were cut short. A sample or
metric that is missing, duplicate or not asked for is an error, and so is another number of few-shot examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fp8pipe.errors import EngineFailed, InputError
from fp8pipe.evaluate.tasks import LoadedTask
from fp8pipe.records import MetricSamples, TaskResult, mean_of_samples

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Example = dict[str, Any]  # Any: lm-eval's logged sample: ids, hashes, responses, one entry per metric
Results = Mapping[str, Any]  # Any: lm-eval's EvalResults
Cell = tuple[str, str]
"""(metric, filter)"""


def task_result(task: LoadedTask, results: Results, cut: set[tuple[str, int]]) -> TaskResult:
    """The result of one suite entry.

    `cut` has (leaf, position among its scored documents) of each generation that reached its length limit. Raises
    EngineFailed for results other than those asked for, and InputError for a task that cannot be recorded.
    """
    ids = task.sample_ids()
    logged = {leaf: _by_filter(leaf, results["samples"].get(leaf, []), set(ids[leaf])) for leaf in ids}
    for leaf in ids:
        _check_shots(leaf, results["n-shot"].get(leaf), task.num_fewshot)
    cells = _common_cells(task.name, logged)
    any_filter = cells[0][1]
    examples = [logged[leaf][any_filter][document] for leaf, document in task.picks]
    generates = any(_generates(task.leaves[leaf]) for leaf in ids)
    positions = {leaf: {document: place for place, document in enumerate(ids[leaf])} for leaf in ids}
    return TaskResult(
        task=task.name,
        version="+".join(sorted({str(results["versions"][leaf]) for leaf in ids})),
        num_fewshot=task.num_fewshot,
        doc_ids=_document_ids(task),
        doc_hashes=tuple(example["doc_hash"] for example in examples),
        prompt_hashes=tuple(example["prompt_hash"] for example in examples),
        target_hashes=tuple(example["target_hash"] for example in examples),
        clusters=tuple(leaf for leaf, _ in task.picks) if len(task.leaves) > 1 else (),
        available=task.documents,
        truncated=tuple((leaf, positions[leaf][d]) in cut for leaf, d in task.picks) if generates else (),
        metrics=tuple(_metric(task, cell, logged, results) for cell in cells),
    )


def _by_filter(leaf: str, samples: list[Example], wanted: set[int]) -> dict[str, dict[int, Example]]:
    """filter -> document id -> example, with every wanted document exactly once under each filter."""
    found: dict[str, dict[int, Example]] = {}
    for example in samples:
        documents = found.setdefault(example["filter"], {})
        if example["doc_id"] in documents:
            raise EngineFailed(f"{leaf}: lm-eval reports document {example['doc_id']} twice under {example['filter']}")
        documents[example["doc_id"]] = example
    if not found:
        raise EngineFailed(f"{leaf}: lm-eval reports no samples, expected {len(wanted)}")
    for name, documents in found.items():
        if documents.keys() != wanted:
            counts = f"expected {len(wanted)} documents, found {len(documents)}"
            differing = sorted(documents.keys() ^ wanted)[:5]
            raise EngineFailed(f"{leaf}, filter {name}: {counts}; missing or extra: {differing}")
    return found


def _check_shots(leaf: str, executed: int | None, wanted: int) -> None:
    if executed != wanted:
        raise EngineFailed(f"{leaf}: lm-eval ran {executed} shots, expected {wanted}")


def _common_cells(name: str, logged: dict[str, dict[str, dict[int, Example]]]) -> list[Cell]:
    """The (metric, filter) pairs, which must be the same for every document of every leaf."""
    cells: set[frozenset[Cell]] = set()
    for filters in logged.values():
        for place in range(len(next(iter(filters.values())))):
            rows = {key: list(documents.values())[place] for key, documents in filters.items()}
            cells.add(frozenset((metric, key) for key, row in rows.items() for metric in row["metrics"]))
    if len(cells) != 1:
        raise InputError(f"{name}: its sub-tasks have different metrics; name the sub-tasks in the suite instead")
    return sorted(cells.pop())


def _document_ids(task: LoadedTask) -> tuple[int, ...]:
    """Ids that are unique in the suite entry: in a group they are numbered through all leaves."""
    offsets: dict[str, int] = {}
    total = 0
    for name, leaf in task.leaves.items():
        offsets[name] = total
        total += len(leaf.eval_docs)
    return tuple(offsets[leaf] + document for leaf, document in task.picks)


def _generates(task: Task) -> bool:
    return task.OUTPUT_TYPE == "generate_until"


def _metric(
    task: LoadedTask, cell: Cell, logged: dict[str, dict[str, dict[int, Example]]], results: Results
) -> MetricSamples:
    metric, filter_name = cell
    examples = [logged[leaf][filter_name][document] for leaf, document in task.picks]
    values = tuple(_number(example[metric], f"{task.name}: {metric},{filter_name}") for example in examples)
    fallbacks = {leaf: _fallbacks(task.leaves[leaf], filter_name) for leaf in logged}
    failed = (_no_answer(example, fallbacks[leaf]) for (leaf, _), example in zip(task.picks, examples, strict=True))
    reported = results["results"].get(task.name, {})
    mean, stderr = reported.get(f"{metric},{filter_name}"), reported.get(f"{metric}_stderr,{filter_name}")
    weights = _units([example[metric] for example in examples])
    if len(task.leaves) > 1:
        mean = mean_of_samples(metric, values, weights)  # lm-eval may weight the leaves of a group equally
    if mean is None:
        raise EngineFailed(f"{task.name}: lm-eval reports no {metric},{filter_name}")
    return MetricSamples(
        metric=metric,
        filter=filter_name,
        higher_is_better=bool(results["higher_is_better"].get(task.picks[0][0], {}).get(metric, True)),
        mean=float(mean),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        values=values,
        weights=weights,
        extraction_failed=tuple(failed) if any(fallbacks.values()) else (),
    )


def _number(value: Any, what: str) -> float:  # Any: whatever a task's process_results returns
    """A sample's value as a float: of (log-likelihood, units), as rolling likelihoods are logged, the quotient; of a
    list of outcomes, of which IFEval has one per instruction, the mean."""
    if isinstance(value, tuple) and len(value) == 2:
        log_likelihood, units = value
        return log_likelihood / units
    if isinstance(value, list) and value:
        return math.fsum(_number(one, what) for one in value) / len(value)
    as_float = getattr(value, "__float__", None)
    if as_float is None:
        raise InputError(f"{what}: expected a number per sample, found {type(value).__name__}")
    return as_float()


def _units(values: list[Any]) -> tuple[float, ...]:  # Any: whatever a task's process_results returns
    """Words or bytes that each sample's rolling likelihood is spread over; empty for any other metric."""
    return tuple(float(value[1]) for value in values) if all(isinstance(value, tuple) for value in values) else ()


def _fallbacks(task: Task, filter_name: str) -> list[Any]:  # Any: a filter's fallback is a string or a list of them
    """What this filter's extraction steps return when they find no answer; empty if the filter extracts nothing."""
    steps: list[Any] = [
        make() for ensemble in task._filters if ensemble.name == filter_name for make in ensemble.filters
    ]
    return [step.fallback for step in steps if hasattr(step, "fallback")]


def _no_answer(example: Example, fallbacks: list[Any]) -> bool:
    answers = [
        a for response in example["filtered_resps"] for a in ([response] if isinstance(response, str) else response)
    ]
    return bool(fallbacks) and all(answer in fallbacks for answer in answers)
