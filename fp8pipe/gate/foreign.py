"""Reports on other people's runs: from a folder that lm-eval wrote with `--log_samples --output_path`.

    FOLDER/<model>/results_<time>.json           means, versions, shots, settings
                  /samples_<task>_<time>.jsonl   one line per document and filter

Samples are not repaired: the gate vetoes repeated documents, NaN and missing values. What lm-eval does not write
(kernels, device, tokenizer, truncations, ...) stays empty, and the rules that need it are `unchecked`. If the folder
holds a report.json, it is fp8pipe's own, and the report is read from that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fp8pipe.errors import InputError
from fp8pipe.records import EngineFacts, EvalReport, MetricSamples, TaskResult, mean_of_samples

Row = dict[str, Any]  # Any: one line of a samples file
Results = dict[str, Any]  # Any: lm-eval's results file
Role = Literal["baseline", "candidate"]

_NO_ANSWER = "[invalid]"
"""What lm-eval's extracting filters return when they find no answer, unless the task sets another text."""


def read_report(folder: Path, *, role: Role) -> EvalReport:
    """Read the report in `folder`, fp8pipe's or lm-eval's; of several runs in one folder, the last.

    Raises InputError if there is none, or if its files do not belong together.
    """
    if (folder / "report.json").is_file():
        return EvalReport.load(folder / "report.json")
    path = _last_results(folder)
    results: Results = _json(path)
    stamp = path.stem.removeprefix("results_")
    return EvalReport(
        role=role,
        model_id=str(results.get("model_name") or path.parent.name),
        fingerprint=str(results.get("config", {}).get("model_sha") or ""),
        suite="lm-eval",
        suite_digest="",
        engine=_engine(results),
        tasks=tuple(_tasks(results, path.parent, stamp)),
        add_bos_token=_model_arguments(results).get("add_bos_token"),
        chat_template_hash=results.get("chat_template_sha"),
        tokenizer_hash="",
        seeds={
            name: seed
            for name in ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
            if isinstance(seed := results.get("config", {}).get(name), int)
        },
        versions={
            library: str(results[key])
            for library, key in (("lm_eval", "lm_eval_version"), ("transformers", "transformers_version"))
            if results.get(key)
        },
        table="",
        seconds={},
    )


def _last_results(folder: Path) -> Path:
    found = sorted(folder.rglob("results_*.json"), key=lambda path: path.name)
    if not found:
        raise InputError(
            f"{folder}: expected report.json or results_*.json, found neither; give a folder written by "
            "`fp8pipe evaluate`, or by lm-eval with --log_samples --output_path"
        )
    models = sorted({path.parent.name for path in found})
    if len(models) > 1:
        raise InputError(
            f"{folder}: holds the results of several models, {', '.join(models)}; give the folder of one of them"
        )
    return found[-1]


def _json(path: Path) -> Any:  # Any: the file's content
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error


def _model_arguments(results: Results) -> dict[str, Any]:  # Any: values of the engine's arguments
    """lm-eval's `--model_args`, which it stores as given: a mapping, or `name=value,...`."""
    given = results.get("config", {}).get("model_args") or {}
    if isinstance(given, dict):
        return given
    pairs = (entry.partition("=") for entry in str(given).split(",") if "=" in entry)
    known = {"true": True, "false": False}
    return {name.strip(): known.get(value.strip().lower(), value.strip()) for name, _, value in pairs}


def _engine(results: Results) -> EngineFacts:
    """What the engine was asked for; lm-eval does not record what it did."""
    given = _model_arguments(results)
    quantization = given.get("quantization")
    return EngineFacts(
        linear_kernels=(),
        attention_backend="",
        kv_cache_dtype=str(given.get("kv_cache_dtype", "")),
        quantization=str(quantization) if quantization else None,
        dtype=str(given.get("dtype", "")),
        max_model_len=int(given.get("max_model_len") or given.get("max_length") or 0),
        arguments={name: value for name, value in given.items() if name not in ("pretrained", "tokenizer")},
        device_class="",
        device_name="",
        plugin=None,
    )


# ---------------------------------------------------------------------------------------------- tasks


def _tasks(results: Results, folder: Path, stamp: str) -> Iterator[TaskResult]:
    """Every task with samples, and every group as one task in which each member is a cluster."""
    leaves = {name: _leaf(name, results, folder / f"samples_{name}_{stamp}.jsonl") for name in results["n-samples"]}
    yield from leaves.values()
    for group, parts in results.get("group_subtasks", {}).items():
        members = [leaves[name] for name in _flat(group, results) if name in leaves]
        if parts and members and group not in leaves:
            yield _group(group, members, results)


def _flat(name: str, results: Results) -> Iterator[str]:
    """The tasks of a group, which may contain groups."""
    parts = results.get("group_subtasks", {}).get(name) or ()
    if not parts:
        yield name
    for part in parts:
        yield from _flat(part, results)


def _leaf(name: str, results: Results, path: Path) -> TaskResult:
    if not path.is_file():
        raise InputError(f"{path}: the samples of {name} are missing; run lm-eval with --log_samples")
    rows = _rows(path)
    by_filter: dict[str, list[Row]] = {}
    for row in rows:
        by_filter.setdefault(row.get("filter", "none"), []).append(row)
    for some in by_filter.values():
        some.sort(key=lambda row: row["doc_id"])
    _check_complete(name, by_filter, results, path)
    first = next(iter(by_filter.values()))
    cells = {(metric, key): some for key, some in by_filter.items() for metric in some[0].get("metrics", ())}
    return TaskResult(
        task=name,
        version=str(results["versions"].get(name, "")),
        num_fewshot=int(results["n-shot"].get(name, 0)),
        doc_ids=tuple(row["doc_id"] for row in first),
        doc_hashes=_hashes(first, "doc_hash"),
        prompt_hashes=_hashes(first, "prompt_hash"),
        target_hashes=_hashes(first, "target_hash"),
        unrecorded=("truncated generations",) if _generates(name, results) else (),
        metrics=tuple(_metric(name, cell, some, results) for cell, some in cells.items()),
    )


def _rows(path: Path) -> list[Row]:
    try:  # not splitlines(): texts may contain other line separators unescaped
        return [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not one JSON object per line: {error}; the file is cut off or not lm-eval's"
        ) from error


def _check_complete(name: str, by_filter: dict[str, list[Row]], results: Results, path: Path) -> None:
    """InputError unless every filter has the same documents, as many as lm-eval says it scored."""
    documents = {key: [row["doc_id"] for row in some] for key, some in by_filter.items()}
    expected = results["n-samples"][name]["effective"]
    if not documents or any(len(set(ids)) != expected for ids in documents.values()):
        found = ", ".join(f"{len(set(ids))} under {key}" for key, ids in documents.items()) or "none"
        raise InputError(
            f"{path}: {name} was scored on {expected} documents, but the file holds {found}; it is incomplete"
        )
    if len({tuple(ids) for ids in documents.values()}) > 1:
        raise InputError(f"{path}: the filters of {name} cover different documents; the file is incomplete")


def _hashes(rows: list[Row], key: str) -> tuple[str, ...]:
    return tuple(str(row[key]) for row in rows) if all(row.get(key) for row in rows) else ()


def _generates(name: str, results: Results) -> bool:
    return results.get("configs", {}).get(name, {}).get("output_type") == "generate_until"


def _metric(name: str, cell: tuple[str, str], rows: list[Row], results: Results) -> MetricSamples:
    metric, filter_name = cell
    values, weights = [row.get(metric) for row in rows], ()
    pairs = [value for value in values if isinstance(value, list) and len(value) == 2]
    if len(pairs) == len(values):  # (log-likelihood, words or bytes)
        values, weights = [a / b for a, b in pairs], tuple(float(b) for _, b in pairs)
    reported = results["results"].get(name, {})
    mean, stderr = reported.get(f"{metric},{filter_name}"), reported.get(f"{metric}_stderr,{filter_name}")
    return MetricSamples(
        metric=metric,
        filter=filter_name,
        higher_is_better=bool(results.get("higher_is_better", {}).get(name, {}).get(metric, True)),
        mean=_number(mean),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        values=tuple(map(_number, values)),
        weights=weights,
        extraction_failed=_unanswered(name, filter_name, rows, results),
    )


def _number(value: Any) -> float:  # Any: from lm-eval's file
    """The value as a float; NaN, which the gate vetoes, if it is not a number."""
    return float(value) if isinstance(value, bool | int | float) else float("nan")


def _unanswered(name: str, filter_name: str, rows: list[Row], results: Results) -> tuple[bool, ...]:
    """Per sample, whether the filter found no answer; empty if it does not extract one."""
    filters = results.get("configs", {}).get(name, {}).get("filter_list") or ()
    steps = [step for one in filters if one.get("name") == filter_name for step in one.get("filter", ())]
    fallbacks = {str(step.get("fallback", _NO_ANSWER)) for step in steps if "regex" in str(step.get("function", ""))}
    if not fallbacks:
        return ()
    return tuple(all(str(answer) in fallbacks for answer in row["filtered_resps"]) for row in rows)


def _group(name: str, members: list[TaskResult], results: Results) -> TaskResult:
    """A group as fp8pipe's suites represent it: one numbering of documents over all members, each member a cluster."""
    offsets, total = {}, 0
    for part in members:
        offsets[part.task] = total
        total += int(results["n-samples"][part.task]["original"])
    shared = set.intersection(*({(m.metric, m.filter) for m in part.metrics} for part in members))
    first = members[0]
    return TaskResult(
        task=name,
        version="+".join(sorted({part.version for part in members})),
        num_fewshot=first.num_fewshot,
        doc_ids=tuple(offsets[part.task] + document for part in members for document in part.doc_ids),
        doc_hashes=_all(members, "doc_hashes"),
        prompt_hashes=_all(members, "prompt_hashes"),
        target_hashes=_all(members, "target_hashes"),
        clusters=tuple(part.task for part in members for _ in part.doc_ids),
        unrecorded=tuple(dict.fromkeys(what for part in members for what in part.unrecorded)),
        metrics=tuple(_group_metric(cell, members) for cell in sorted(shared)),
    )


def _all(members: list[TaskResult], field: str) -> tuple[str, ...]:
    parts = [getattr(part, field) for part in members]
    return tuple(value for part in parts for value in part) if all(parts) else ()


def _group_metric(cell: tuple[str, str], members: list[TaskResult]) -> MetricSamples:
    """The mean over all documents. lm-eval may weight the members of a group differently."""
    found = [metric for part in members for metric in part.metrics if (metric.metric, metric.filter) == cell]
    joined = found[0].model_copy(
        update={
            "values": tuple(value for metric in found for value in metric.values),
            "weights": tuple(weight for metric in found for weight in metric.weights),
            "extraction_failed": tuple(flag for metric in found for flag in metric.extraction_failed),
            "stderr": None,
        }
    )
    return joined.model_copy(update={"mean": mean_of_samples(joined.metric, joined.values, joined.weights)})
