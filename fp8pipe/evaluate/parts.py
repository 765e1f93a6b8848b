"""Finished stretches of an evaluation on disk, so that what was interrupted goes on and what grows is appended to.

One part: one suite entry, the documents [start, stop) of its permutation, scored. A part is found again by the identity
of the measurement (model, suite, engine, versions; not how many documents). The report of an evaluation is joined from
parts, whether one process made them or several.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from fp8pipe.config import LIKELIHOODS
from fp8pipe.errors import EngineFailed
from fp8pipe.records import MetricSamples, Record, ServingFigures, TaskResult, mean_of_samples

ROWS = ("results", "groups", "versions", "n-shot", "higher_is_better", "group_subtasks")
"""What lm-eval's table is drawn from."""


class Part(Record):
    """Documents [start, stop) of one suite entry."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    identity: str
    start: int
    stop: int
    result: TaskResult
    rows: dict[str, Any]  # Any: lm-eval's results, by ROWS


class Timing(Record):
    """The serving figures of one measurement."""

    identity: str
    figures: ServingFigures


@dataclass(frozen=True)
class Parts:
    """The parts of one measurement."""

    folder: Path
    identity: str

    def find(self, task: str, stops: Sequence[int], *, whole_looks: bool = False) -> list[Part]:
        """Parts that follow each other from document 0 on and do not go beyond the last of `stops`; longest first
        choice. whole_looks: only parts that begin and end where one looks, since their prompts depend on it."""
        found = [part for path in self._paths(task) if (part := Part.load_if_present(path)) is not None]
        looks = set(pairwise((0, *stops)))
        usable = [
            part
            for part in found
            if part.identity == self.identity
            and part.stop <= stops[-1]
            and (not whole_looks or (part.start, part.stop) in looks)
        ]
        chain: list[Part] = []
        while following := [part for part in usable if part.start == (chain[-1].stop if chain else 0)]:
            chain.append(max(following, key=lambda part: part.stop))
        return chain

    def save(self, task: str, part: Part) -> None:
        """Put a finished part where `find` sees it."""
        part.save(self.folder / f"{_file_name(task)}-{part.start}-{part.stop}.json")

    def again(self) -> Parts:
        """The parts of the second run of a baseline."""
        return Parts(self.folder / "again", self.identity)

    def find_timing(self) -> ServingFigures | None:
        """The serving figures of this measurement, if it got so far."""
        found = Timing.load_if_present(self.folder / "serving" / "figures.json")
        return found.figures if found is not None and found.identity == self.identity else None

    def save_timing(self, figures: ServingFigures) -> None:
        """Keep the serving figures."""
        Timing(identity=self.identity, figures=figures).save(self.folder / "serving" / "figures.json")

    def _paths(self, task: str) -> list[Path]:
        pattern = re.compile(re.escape(_file_name(task)) + r"-\d+-\d+\.json")
        return sorted(path for path in self.folder.glob("*.json") if pattern.fullmatch(path.name))


def _file_name(task: str) -> str:
    return re.sub(r"[^\w.-]", "_", task)


def joined(parts: list[Part]) -> TaskResult:
    """All documents of consecutive parts as one result."""
    first = parts[0].result
    if len(parts) == 1:
        return first
    tuples = ("doc_ids", "doc_hashes", "prompt_hashes", "target_hashes", "clusters", "truncated")
    long = {name: tuple(value for part in parts for value in getattr(part.result, name)) for name in tuples}
    cells = [(metric.metric, metric.filter) for metric in first.metrics]
    return first.model_copy(update={**long, "metrics": tuple(_joined_metric(parts, *cell) for cell in cells)})


def _joined_metric(parts: list[Part], metric: str, filter_name: str) -> MetricSamples:
    pieces = [part.result.samples_of(metric, filter_name) for part in parts]
    found = [piece for piece in pieces if piece is not None]
    if len(found) != len(parts):
        raise EngineFailed(f"{parts[0].result.task}: not every part has the metric {metric},{filter_name}")
    values = tuple(value for piece in found for value in piece.values)
    weights = tuple(weight for piece in found for weight in piece.weights)
    return found[0].model_copy(
        update={
            "values": values,
            "weights": weights,
            "extraction_failed": tuple(failed for piece in found for failed in piece.extraction_failed),
            "mean": mean_of_samples(metric, values, weights),
            "stderr": None if weights or metric in LIKELIHOODS else _standard_error(values),
        }
    )


def _standard_error(values: tuple[float, ...]) -> float | None:
    """Standard error of the mean, from the sample variance, as lm-eval's."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def table_rows(task: str, parts: list[Part]) -> dict[str, Any]:  # Any: as Part.rows
    """What lm-eval's table shows of this entry: its own rows, or one row of all parts together."""
    rows = parts[0].rows
    if len(parts) == 1:
        return rows
    together = joined(parts)
    row: dict[str, Any] = {"alias": task}
    for metric in together.metrics:
        row[f"{metric.metric},{metric.filter}"] = metric.mean
        row[f"{metric.metric}_stderr,{metric.filter}"] = "N/A" if metric.stderr is None else metric.stderr
    better = {metric.metric: metric.higher_is_better for metric in together.metrics}
    return {
        "results": {task: row},
        "versions": {task: together.version},
        "n-shot": {task: together.num_fewshot},
        "higher_is_better": {task: better},
    }
