"""The datasets behind tasks, and what the source's authors publish as its score on them.

Two people's measurements of one model differ in prompts, shots and metrics: the card shows theirs beside our baseline,
and decides nothing by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8pipe.hub.source import read_file
from fp8pipe.hub.source_card import MAX_FRONT_MATTER, MAX_VALUES, parse_source_card, parse_yaml, read_source_card
from fp8pipe.model.untrusted import is_plain
from fp8pipe.records import Snapshot, TaskDecision
from fp8pipe.records.published import PublishedScore


@dataclass(frozen=True, slots=True)
class Dataset:
    """The dataset of a task, as the Hub knows it."""

    id: str
    benchmark: str | None = None
    """Its id in the dataset's eval.yaml, if the Hub keeps a leaderboard of it and the task is scored as there."""
    names: tuple[str, ...] = ()
    """What cards call it, where that is neither the task's name nor the dataset's."""

    def all_names(self) -> tuple[str, ...]:
        return self.names or (self.id.rpartition("/")[2],)


DATASETS = {
    "arc_challenge": Dataset("allenai/ai2_arc", names=("ARC-Challenge", "ARC-C", "AI2 Reasoning Challenge")),
    "arc_easy": Dataset("allenai/ai2_arc", names=("ARC-Easy", "ARC-E")),
    "gsm8k": Dataset("openai/gsm8k", "gsm8k"),
    "hellaswag": Dataset("Rowan/hellaswag"),
    "mmlu": Dataset("cais/mmlu"),
    "truthfulqa_mc2": Dataset("truthfulqa/truthful_qa", names=("TruthfulQA", "TruthfulQA mc2")),
    "winogrande": Dataset("allenai/winogrande"),
    "mmlu_pro": Dataset("TIGER-Lab/MMLU-Pro", "mmlu_pro"),
    "ifeval": Dataset("google/IFEval"),
    "leaderboard_mmlu_pro": Dataset("TIGER-Lab/MMLU-Pro", names=("MMLU-Pro",)),
    "leaderboard_bbh": Dataset("SaylorTwift/bbh", names=("BBH", "BIG-Bench Hard")),
    "leaderboard_gpqa": Dataset("Idavidrein/gpqa", names=("GPQA",)),
    "leaderboard_math_hard": Dataset("DigitalLearningGmbH/MATH-lighteval", names=("MATH hard", "MATH Lvl 5")),
    "leaderboard_ifeval": Dataset("google/IFEval", names=("IFEval",)),
    "leaderboard_musr": Dataset("TAUR-Lab/MuSR", names=("MuSR",)),
}
"""Tasks of lm-eval that measure a public dataset; tasks with data of their own are in none."""


def scores_in_card(front_matter: Mapping[str, Any]) -> Iterator[PublishedScore]:
    """The results of a `model-index`. Entries that are not as the Hub writes them are passed over."""
    for model in _mappings(front_matter.get("model-index")):
        for result in _mappings(model.get("results")):
            dataset = result.get("dataset")
            if not isinstance(dataset, dict):
                continue
            where = dataset.get("type"), dataset.get("name")
            for metric in _mappings(result.get("metrics")):
                yield from _score(*where, metric.get("type"), metric.get("value"), "card")


def scores_in_results(content: object) -> Iterator[PublishedScore]:
    """The entries of one file of `.eval_results/`."""
    for entry in _mappings(content):
        dataset = entry.get("dataset")
        if isinstance(dataset, dict):
            yield from _score(dataset.get("id"), dataset.get("task_id"), None, entry.get("value"), ".eval_results")


def read_published(source: Snapshot) -> tuple[PublishedScore, ...]:
    """The scores in the source's card and in its `.eval_results/`. What cannot be read is passed over."""
    found = list(scores_in_card(parse_source_card(read_source_card(source)).content))
    for file in source.files:
        if file.name.startswith(".eval_results/") and file.size <= MAX_FRONT_MATTER:
            found += scores_in_results(parse_yaml(read_file(source, file.name).decode(errors="replace"))[0])
    return tuple(found[:MAX_VALUES])


def _mappings(value: object) -> list[dict[str, Any]]:
    listed = value if isinstance(value, list) else []
    return [one for one in listed[:MAX_VALUES] if isinstance(one, dict)]


def _score(dataset: object, name: object, metric: object, value: object, where: str) -> Iterator[PublishedScore]:
    texts = [one if isinstance(one, str) and is_plain(one) else "" for one in (dataset, name, metric)]
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        return
    if math.isfinite(number) and any(texts[:2]):
        yield PublishedScore(dataset=texts[0], name=texts[1], metric=texts[2], value=number, where=where)


def published_for(task: TaskDecision, scores: Sequence[PublishedScore]) -> list[PublishedScore]:
    """The scores that others give the source on this task, each once."""
    known = DATASETS.get(task.task)
    wanted = {_letters(name) for name in (task.task, *(known.all_names() if known is not None else ()))}
    found = [score for score in scores if {_letters(score.name), _letters(score.dataset.rpartition("/")[2])} & wanted]
    return list({(score.metric, score.value): score for score in found}.values())


def _letters(name: str) -> str:
    """What counts in a name: `GSM8K (5-shot)` and `gsm8k` are the same."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"\(.*?\)|\b\d+[- ]shot\b", "", name.lower()))
