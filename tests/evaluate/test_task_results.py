"""lm-eval's results as records: in the order of the permutation, and nothing else than was asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fp8pipe.errors import EngineFailed, InputError
from fp8pipe.evaluate.results import task_result
from fp8pipe.records import TaskResult

GroupRun = tuple[Any, dict[str, Any]]


def test_group_result_follows_the_permutation_and_names_its_clusters(group_run: GroupRun) -> None:
    task, results = group_run
    found = task_result(task, results, set())
    assert found.clusters == tuple(leaf for leaf, _ in task.picks)
    assert found.doc_ids == tuple(i + (24 if leaf == "tiny_part_b" else 0) for leaf, i in task.picks)
    acc = found.samples_of("acc", "none")
    assert acc is not None
    by_document = {(leaf, s["doc_id"]): s for leaf in results["samples"] for s in results["samples"][leaf]}
    assert acc.values == tuple(by_document[pick]["acc"] for pick in task.picks)
    assert found.doc_hashes == tuple(by_document[pick]["doc_hash"] for pick in task.picks)
    assert acc.mean == pytest.approx(results["groups"]["tiny_group"]["acc,none"])
    assert (found.version, found.num_fewshot, found.available) == ("3.0", 1, 32)


def test_samples_carry_the_ids_of_their_own_documents(group_run: GroupRun) -> None:
    _, results = group_run
    for leaf in results["samples"]:
        for sample in results["samples"][leaf]:
            assert sample["doc"]["question"].startswith(f"{sample['doc_id']} plus")


def broken_copy(results: dict[str, Any], change: str) -> dict[str, Any]:
    samples = {leaf: [dict(s) for s in rows] for leaf, rows in results["samples"].items()}
    rows = samples["tiny_part_a"]
    if change == "missing":
        rows.pop()
    elif change == "twice":
        rows.append(rows[0])
    elif change == "not asked for":
        rows.append(rows[0] | {"doc_id": 99})
    elif change == "metric":
        rows[0]["metrics"] = ["acc"]
    shots = results["n-shot"] | ({"tiny_part_a": 0} if change == "shots" else {})
    return results | {"samples": samples, "n-shot": shots}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("missing", EngineFailed, "expected 15 documents, found 14"),
        ("twice", EngineFailed, "twice"),
        ("not asked for", EngineFailed, "expected 15 documents, found 16"),
        ("metric", InputError, "different metrics"),
        ("shots", EngineFailed, "ran 0 shots, expected 1"),
    ],
)
def test_results_other_than_asked_for_are_errors(
    group_run: GroupRun, change: str, error: type[Exception], message: str
) -> None:
    task, results = group_run
    with pytest.raises(error, match=message):
        task_result(task, broken_copy(results, change), set())


def test_nan_reaches_the_record_and_survives_its_file(group_run: GroupRun, tmp_path: Path) -> None:
    task, results = group_run
    changed = broken_copy(results, "none")
    leaf, document = task.picks[2]
    next(s for s in changed["samples"][leaf] if s["doc_id"] == document)["acc"] = math.nan
    loaded = TaskResult.load(task_result(task, changed, set()).save(tmp_path / "task.json"))
    acc = loaded.samples_of("acc", "none")
    assert acc is not None
    assert math.isnan(acc.values[2])
    assert math.isnan(acc.mean)
