"""The gate on folders that lm-eval wrote: recorded facts are compared, others are unchecked, and no defect passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.reports import flipped, policy, values

from fp8pipe.config import PerplexityPolicy, TaskPolicy
from fp8pipe.errors import InputError
from fp8pipe.gate import decide
from fp8pipe.gate.foreign import read_report
from fp8pipe.records import GateDecision

STAMP = "2026-01-02T03-04-05.678901"
Rows = list[dict[str, Any]]


def rows_of(outcomes: tuple[float, ...]) -> Rows:
    """Lines of a samples file with two filters, as lm-eval 0.4.13 writes them."""
    return [
        {
            "doc_id": i,
            "filter": name,
            "metrics": ["exact_match"],
            "exact_match": outcome,
            "filtered_resps": ["[invalid]" if i % 50 == 0 and name == "strict" else "7"],
            "doc_hash": f"doc{i}",
            "prompt_hash": f"prompt{i}",
            "target_hash": f"target{i}",
        }
        for i, outcome in enumerate(outcomes)
        for name in ("none", "strict")
    ]


def write(folder: Path, outcomes: tuple[float, ...], change: Callable[[Rows, dict[str, Any]], object] | None = None):
    """An output folder of lm-eval on one generative task, after `change(rows, results)`."""
    rows, n = rows_of(outcomes), len(outcomes)
    mean = sum(outcomes) / n
    results: dict[str, Any] = {
        "results": {"qa": {"exact_match,none": mean, "exact_match_stderr,none": "N/A", "exact_match,strict": mean}},
        "group_subtasks": {},
        "configs": {
            "qa": {
                "output_type": "generate_until",
                "filter_list": [
                    {"name": "strict", "filter": [{"function": "regex", "regex_pattern": "x"}]},
                    {"name": "none", "filter": [{"function": "take_first"}]},
                ],
            }
        },
        "versions": {"qa": 1.0},
        "n-shot": {"qa": 5},
        "higher_is_better": {"qa": {"exact_match": True}},
        "n-samples": {"qa": {"original": n, "effective": n}},
        "config": {
            "model": "vllm",
            "model_args": "pretrained=acme/tiny,dtype=bfloat16,max_model_len=4096,add_bos_token=True",
            "random_seed": 0,
            "fewshot_seed": 1234,
        },
        "model_name": "acme/tiny",
        "chat_template_sha": None,
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.19.0",
    }
    if change is not None:
        change(rows, results)
    place = folder / "acme__tiny"
    place.mkdir(parents=True, exist_ok=True)
    (place / f"results_{STAMP}.json").write_text(json.dumps(results))
    (place / f"samples_qa_{STAMP}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def decided(folder: Path, *, lost: int = 0, won: int = 0, change: Any = None, on_both: bool = False) -> GateDecision:
    ours = values(1800, 2000)
    one = write(folder / "a", ours, change if on_both else None)
    other = write(folder / "b", flipped(ours, lost=lost, won=won), change)
    return decide(read_report(one, role="baseline"), read_report(other, role="candidate"), policy())


@pytest.mark.parametrize(("lost", "verdict"), [(20, "accepted"), (60, "inconclusive"), (150, "rejected")])
def test_two_folders_of_lm_eval_are_decided_by_their_numbers(tmp_path, lost, verdict):
    decision = decided(tmp_path, lost=lost, won=15)
    assert (decision.verdict, decision.vetoed) == (verdict, ())
    assert decision.tasks[0].discordant_lost == lost


def test_what_lm_eval_does_not_write_is_unchecked(tmp_path):
    assert set(decided(tmp_path).unchecked) == {
        *("completeness", "suite", "versions", "tokenizer", "device", "fingerprint", "kernels", "kv_cache"),
        *("modules", "truncation"),
    }


def test_what_lm_eval_writes_is_compared(tmp_path):
    def other_setting(rows: Rows, results: dict[str, Any]) -> None:
        results["config"]["model_args"] = "pretrained=acme/tiny,dtype=float16,max_model_len=2048,add_bos_token=False"
        results["config"]["model_args"] += ",tensor_parallel_size=2"
        results["config"]["fewshot_seed"] = 1
        results["n-shot"]["qa"] = 0
        results["chat_template_sha"] = "ab"
        results["lm_eval_version"] = "0.4.12"

    vetoed = decided(tmp_path, change=other_setting).vetoed
    assert set(vetoed) == {"versions", "templates", "seeds", "shots", "bos", "context", "dtype", "parallelism"}


def test_failed_extractions_are_read_from_the_filters_answers(tmp_path):
    task = read_report(write(tmp_path, values(90, 100)), role="baseline").tasks[0]
    strict, none = (task.samples_of("exact_match", name) for name in ("strict", "none"))
    assert strict is not None
    assert none is not None
    assert [i for i, failed in enumerate(strict.extraction_failed) if failed] == [0, 50]
    assert none.extraction_failed == ()


def test_a_text_with_unusual_line_separators_stays_one_line(tmp_path):
    def odd(rows: Rows, results: dict[str, Any]) -> None:
        rows[3]["resps"] = [["one\u2028two\u2029three\u0085four"]]

    folder = write(tmp_path, values(90, 100), odd)
    (samples,) = folder.rglob("samples_*")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    samples.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))  # as lm-eval writes it
    assert len(read_report(folder, role="baseline").tasks[0].doc_ids) == 100


def test_a_samples_file_that_is_cut_off_is_an_error_that_names_it(tmp_path):
    folder = write(tmp_path, values(90, 100))
    (samples,) = folder.rglob("samples_*")
    samples.write_text(samples.read_text()[:-9])
    with pytest.raises(InputError, match=rf"{samples.name}: not one JSON object per line"):
        read_report(folder, role="baseline")


def repeat(rows: Rows, results: dict[str, Any]) -> None:
    rows.extend([row for row in rows if row["doc_id"] == 7])


def not_a_number(rows: Rows, results: dict[str, Any]) -> None:
    rows[0]["exact_match"] = float("nan")


def no_value(rows: Rows, results: dict[str, Any]) -> None:
    del rows[0]["exact_match"]


def other_prompt(rows: Rows, results: dict[str, Any]) -> None:
    rows[0]["prompt_hash"] = "another"


def other_documents(rows: Rows, results: dict[str, Any]) -> None:
    for row in rows:
        row["doc_id"] += 1


def one_more(rows: Rows, results: dict[str, Any]) -> None:
    rows.extend({**row, "doc_id": 2000} for row in rows[:2])
    results["n-samples"]["qa"]["effective"] = 2001


def no_metric(rows: Rows, results: dict[str, Any]) -> None:
    for row in rows:
        row["metrics"] = []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (repeat, "samples"),
        (not_a_number, "metrics"),
        (no_value, "metrics"),
        (other_prompt, "samples"),
        (other_documents, "samples"),
        (one_more, "samples"),
        (no_metric, "metrics"),
    ],
)
def test_a_sample_that_is_duplicate_missing_extra_or_different_is_vetoed(tmp_path, change, rule):
    decision = decided(tmp_path, change=change)
    assert decision.verdict == "rejected"
    assert rule in decision.vetoed


@pytest.mark.parametrize("change", [repeat, not_a_number, no_value])
def test_the_same_defect_on_both_sides_is_rejected_too(tmp_path, change):
    assert decided(tmp_path, change=change, on_both=True).verdict == "rejected"


def test_a_folder_that_lacks_samples_is_refused(tmp_path):
    def cut(rows: Rows, results: dict[str, Any]) -> None:
        rows.pop()

    with pytest.raises(InputError, match="1999 under strict; it is incomplete"):
        decided(tmp_path, change=cut)
    (tmp_path / "a" / "acme__tiny" / f"samples_qa_{STAMP}.jsonl").unlink()
    with pytest.raises(InputError, match="--log_samples"):
        read_report(tmp_path / "a", role="baseline")


def test_folders_without_results_or_with_two_models_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected report\.json or results"):
        read_report(tmp_path, role="baseline")
    write(tmp_path / "one", values(9, 10))
    write(tmp_path / "two", values(9, 10))
    (tmp_path / "two" / "acme__tiny").rename(tmp_path / "one" / "other")
    with pytest.raises(InputError, match="acme__tiny, other"):
        read_report(tmp_path / "one", role="baseline")


def test_the_last_run_in_a_folder_counts(tmp_path):
    write(tmp_path, values(50, 100))
    place = tmp_path / "acme__tiny"
    for path in list(place.iterdir()):
        path.rename(path.with_name(path.name.replace("2026", "2025")))
    write(tmp_path, values(90, 100))
    assert read_report(tmp_path, role="baseline").tasks[0].metrics[0].mean == 0.9


def test_a_group_is_one_task_whose_members_are_clusters(tmp_path):
    def grouped(rows: Rows, results: dict[str, Any]) -> None:
        results["group_subtasks"] = {"both": ["qa", "more"]}
        for name in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples"):
            results[name]["more"] = results[name]["qa"]

    folder = write(tmp_path, values(9, 10), grouped)
    place = folder / "acme__tiny"
    (place / f"samples_more_{STAMP}.jsonl").write_bytes((place / f"samples_qa_{STAMP}.jsonl").read_bytes())
    group = read_report(folder, role="baseline").task("both")
    assert group is not None
    assert group.doc_ids == tuple(range(20))
    assert group.clusters == ("qa",) * 10 + ("more",) * 10
    metric = group.samples_of("exact_match", "none")
    assert metric is not None
    assert metric.mean == pytest.approx(0.9)


@pytest.mark.long
def test_files_that_lm_eval_itself_wrote_are_read_including_perplexities(tmp_path):
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\n{data}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{answer}}'\ngeneration_kwargs: {until: ['x']}\nmetric_list: [{metric: exact_match}]\n"
    )
    (tmp_path / "roll.yaml").write_text(
        f"task: roll\n{data}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{question}} in words'\nmetric_list: [{metric: word_perplexity}]\n"
    )
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "dummy", "--tasks", "toy,roll", "--log_samples"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # it would ask the Hub about itself, and wait where there is none
    subprocess.run(command, check=True, capture_output=True, env=offline)
    report = read_report(tmp_path / "out", role="baseline")
    rules = policy(
        tasks={"toy": TaskPolicy(metric="exact_match", margin=0.2, min_baseline=-1.0)},
        perplexity={"roll": PerplexityPolicy(max_increase=0.1, min_baseline=10)},
    )
    decision = decide(report, report, rules)
    assert decision.vetoed == ()
    assert decision.verdict == "accepted"
