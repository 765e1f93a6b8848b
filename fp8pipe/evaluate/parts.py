"""Finished parts of an evaluation on disk, so that an interrupted one resumes and a longer one appends.

A part is one suite entry's documents [start, stop), in the order of its permutation, scored. It is found again by the
identity of the measurement: model, suite, engine and versions, but not the number of documents. A report is joined from
parts, no matter how many processes made them.
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
from fp8pipe.records import (
    PROOF_VERSION,
    MetricSamples,
    ModuleProof,
    Record,
    ServingFigures,
    TaskResult,
    mean_of_samples,
)

ROWS = ("results", "groups", "versions", "n-shot", "higher_is_better", "group_subtasks")
"""Keys of lm-eval's results that its table is made from."""


class Part(Record):
    """The result for documents [start, stop) of one suite entry."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    identity: str
    start: int
    stop: int
    result: TaskResult
    rows: dict[str, Any]  # Any: lm-eval's results, by ROWS


class Proof(Record):
    """The module proof of one measurement."""

    identity: str
    proof: ModuleProof


class Timing(Record):
    """The serving figures of one measurement."""

    identity: str
    figures: ServingFigures


@dataclass(frozen=True)
class Parts:
    """The parts of one measurement, in a folder."""

    folder: Path
    identity: str

    def find(self, task: str, stops: Sequence[int], *, whole_looks: bool = False) -> list[Part]:
        """Consecutive parts from document 0 on, none beyond the last of `stops`. Of several that could follow, the
        longest is taken. With `whole_looks`, only parts that begin and end at a look: their prompts depend on it."""
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
        """Save a finished part."""
        part.save(self.folder / f"{_file_name(task)}-{part.start}-{part.stop}.json")

    def again(self) -> Parts:
        """The parts of a baseline's second run."""
        return Parts(self.folder / "again", self.identity)

    def find_proof(self) -> ModuleProof | None:
        """The module proof of this measurement; None if there is none of this version."""
        found = Proof.load_if_present(self.folder / "modules" / "proof.json")
        fits = found is not None and found.identity == self.identity and found.proof.version == PROOF_VERSION
        return found.proof if found is not None and fits else None

    def save_proof(self, proof: ModuleProof) -> None:
        """Save the module proof."""
        Proof(identity=self.identity, proof=proof).save(self.folder / "modules" / "proof.json")

    def find_timing(self) -> ServingFigures | None:
        """The serving figures of this measurement; None if they have not been taken."""
        found = Timing.load_if_present(self.folder / "serving" / "figures.json")
        return found.figures if found is not None and found.identity == self.identity else None

    def save_timing(self, figures: ServingFigures) -> None:
        """Save the serving figures."""
        Timing(identity=self.identity, figures=figures).save(self.folder / "serving" / "figures.json")

    def _paths(self, task: str) -> list[Path]:
        pattern = re.compile(re.escape(_file_name(task)) + r"-\d+-\d+\.json")
        return sorted(path for path in self.folder.glob("*.json") if pattern.fullmatch(path.name))


def _file_name(task: str) -> str:
    return re.sub(r"[^\w.-]", "_", task)


def joined(parts: list[Part]) -> TaskResult:
    """The result for all documents of consecutive parts."""
    first = parts[0].result
    if len(parts) == 1:
        return first
    fields = ("doc_ids", "doc_hashes", "prompt_hashes", "target_hashes", "clusters", "truncated")
    per_document = {name: tuple(value for part in parts for value in getattr(part.result, name)) for name in fields}
    cells = [(metric.metric, metric.filter) for metric in first.metrics]
    return first.model_copy(update={**per_document, "metrics": tuple(_joined_metric(parts, *cell) for cell in cells)})


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
    """Standard error of the mean from the sample variance, as lm-eval computes it; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def table_rows(task: str, parts: list[Part]) -> dict[str, Any]:  # Any: as Part.rows
    """Rows of lm-eval's table for this suite entry: lm-eval's own for a single part, else one row for all parts."""
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
