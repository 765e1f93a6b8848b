"""The front matter of a model card, and results for the Hub's leaderboards, written by the Hub's own client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fp8pipe.records import TaskDecision


def front_matter(
    name: str,
    *,
    results: Sequence[TaskDecision],
    dataset_ids: Mapping[str, str],
    tags: Sequence[str],
    datasets: Sequence[str],
    base_model: str | None,
    inherited: Mapping[str, Any],  # Any: values of a YAML that we did not write
) -> str:
    """The YAML for a quantized model called `name`, without the lines of dashes around it.

    `dataset_ids` names the dataset of a task on the Hub, where it has one. `inherited` holds entries of the source's
    own card. `base_model` is None if the source is not on the Hub.
    """
    from huggingface_hub import EvalResult, ModelCardData

    base = {"base_model": base_model, "base_model_relation": "quantized"} if base_model is not None else {}
    # Any: the constructor's keywords have many types
    rest: dict[str, Any] = {"pipeline_tag": "text-generation"} | dict(inherited) | base
    data = ModelCardData(
        library_name="vllm",
        tags=list(tags),
        datasets=list(datasets) or None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                task_name=task.task,
                dataset_type=dataset_ids.get(task.task, task.task),
                dataset_name=task.task,
                metric_type=task.metric,
                metric_value=round(task.candidate, 4),
                metric_name=f"{task.metric} ({task.filter})",
            )
            for task in results
        ],
        **rest,
    )
    return data.to_yaml(line_break="\n").rstrip()


def leaderboard_entry(dataset: str, benchmark: str, value: float, notes: str) -> bytes:
    """A file of `.eval_results/` with one result. `benchmark`: the id of the task in the dataset's eval.yaml; `value`:
    in percent, as the Hub's leaderboards have it."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entry = EvalResultEntry(dataset_id=dataset, task_id=benchmark, value=value, notes=notes)
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False).encode()
