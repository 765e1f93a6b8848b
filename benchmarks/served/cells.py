"""One architecture under one recipe: quantized, validated, loaded and served by vLLM, and compared with its source.

In: a name of `models.MODELS` and a recipe. Out: a `Cell`, kept as JSON in the work folder, so that an interrupted run
resumes and a single cell can be made again.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.served import models
from benchmarks.served.answers import load_answers, save_answers
from benchmarks.served.reference import PROMPTS, Reference, reference, relative_error
from fp8pipe import stages
from fp8pipe.config import CalibrationSpec, Recipe, load_recipe
from fp8pipe.errors import InputError
from fp8pipe.evaluate.environment import library_versions
from fp8pipe.files import digest_of
from fp8pipe.quantize import ENGINE_VERSION
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Record
from fp8pipe.release.workspace import Workspace

LIMIT = 0.15
"""Largest relative L2 error of the centred logits that passes. A copy with doubled scales must exceed it."""

CHECK_VERSION = 1
"""Increase it when the check itself changes, so that all cells are made again."""

MIN_AGREEING = 0.5
"""Share of tokens that must go to the same experts as in the source; below it, too few are left to compare."""

ROOT = Path(__file__).parents[2]


class Cell(Record):
    """The result for one architecture under one recipe."""

    model: str
    recipe: str
    key: str
    """Digest of all that the result depends on; a cell with another key is made again."""
    verdict: Literal["passed", "failed", "unserved"]
    """unserved: the checkpoint is sound, but vLLM cannot serve it, or its source, on this machine."""
    message: str = ""
    """Why it failed; vLLM's own message if it is unserved."""
    source_error: float | None = None
    """Error of the unquantized source in vLLM, from bfloat16 and vLLM's own kernels."""
    error: float | None = None
    doubled_error: float | None = None
    """Error of the copy in which the scales of one projection of the last layer are doubled."""
    tokens: int = 0
    """Positions whose logits were compared."""
    of_tokens: int = 0
    """All positions; those not compared went to other experts than in the source."""
    tensors: int = 0
    """Tensors on disk, each of which has a fitting place in vLLM's model."""
    parameters: int = 0
    """Parameters of vLLM's model, each of which is filled."""


@dataclass(frozen=True)
class Candidate:
    """A quantized checkpoint and its sabotaged copy, not compared yet."""

    cell: Cell
    source_folder: Path
    folder: Path
    doubled: Path
    kv_cache_dtype: str
    source: Reference


Report = Callable[[str], None]


def cell_path(work: Path, model: str, recipe_name: str) -> Path:
    """Where a cell is kept."""
    return work / "cells" / _slug(model) / f"{recipe_name}.json"


def known_cell(work: Path, model: str, recipe: Recipe) -> Cell | None:
    """The cell of an earlier run if the plan, the libraries and the kernels are still the same, else None."""
    cell = Cell.load_if_present(cell_path(work, model, recipe.name))
    if cell is None or not (_model_root(work, model) / "telling").exists():
        return None
    return cell if cell.key == _key(model, recipe, _plan_or_refusal(source_model(model, work)[0], recipe)) else None


def _key(model: str, recipe: Recipe, plan: Plan | str) -> str:
    """Digest of model, recipe, plan (or why there is none), versions and the CPU platform's kernels."""
    planned = plan if isinstance(plan, str) else [plan.quantization_config, *(str(output) for output in plan.outputs)]
    kernels = [path.read_text() for path in sorted((ROOT / "fp8pipe" / "evaluate" / "cpu").glob("*.py"))]
    versions = [ENGINE_VERSION, CHECK_VERSION, library_versions()]
    return digest_of([models.model_key(model), recipe.identity(), planned, versions, kernels])


def shipped_recipes(work: Path) -> list[Recipe]:
    """Every recipe in configs/recipes, calibrated on rows made here; of recipes that are then alike, the first."""
    rows = models.write_calibration(work / "calibration.txt")
    data = CalibrationSpec(dataset=str(rows), split="train", num_samples=models.CALIBRATION_ROWS, max_seq_len=32)
    recipes: dict[str, Recipe] = {}
    names = sorted(path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml"))
    for name in sorted(names, key=lambda name: name.startswith("demo")):
        recipe = load_recipe(name).model_copy(update={"calibration": data})
        recipes.setdefault(str(recipe.identity()), recipe)
    return list(recipes.values())


def make_cells(wanted: Sequence[tuple[str, Recipe]], work: Path, report: Report) -> Iterator[Cell]:
    """Make every wanted cell, in three passes: quantize all, run vLLM's loader on all, have vLLM serve all."""
    candidates: list[Candidate] = []
    for model, recipe in wanted:
        made = _make(model, recipe, work)
        report(f"{model}, {recipe.name}: {made.message if isinstance(made, Cell) else 'quantized, sound'}")
        if isinstance(made, Cell):
            yield _kept(made, work)
        else:
            candidates.append(made)
    fitting, rejected = _with_parity(candidates)
    for cell in chain(rejected, _served(fitting, work)):
        report(f"{cell.model}, {cell.recipe}: {cell.verdict} {cell.message}")
        yield _kept(cell, work)


def _kept(cell: Cell, work: Path) -> Cell:
    path = cell_path(work, cell.model, cell.recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    cell.save(path)
    return cell


# ---------------------------------------------------------------------------------------------- the checkpoint


def _make(model: str, recipe: Recipe, work: Path) -> Candidate | Cell:
    """Quantize and validate; a finished Cell if that already decides the result."""
    source, answers = source_model(model, work)
    plan = _plan_or_refusal(source, recipe)
    cell = Cell(model=model, recipe=recipe.name, key=_key(model, recipe, plan), verdict="failed")
    if isinstance(plan, str):
        return cell.model_copy(update={"message": f"refused by fp8pipe: {plan}"})
    folder = work / "checkpoints" / f"{_slug(model)}-{recipe.name}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(f"{folder.name}-doubled"), ignore_errors=True)
    try:
        _quantize(source, recipe, plan, folder, work)
    except InputError as error:
        return cell.model_copy(update={"message": f"refused by fp8pipe: {error}"})
    report = stages.validate_model(str(folder), source=str(source))
    if report.errors:
        return cell.model_copy(update={"message": f"not sound: {report.errors[0].sentence()}"})
    scales = [output.module for output in plan.outputs if output.role == "weight_scale"]
    telling = next(pattern for pattern in answers.telling if any(re.fullmatch(pattern, module) for module in scales))
    return Candidate(
        cell=cell,
        source_folder=source,
        folder=folder,
        doubled=_with_doubled_scales(folder, plan, telling),
        kv_cache_dtype="fp8" if any(output.role == "k_scale" for output in plan.outputs) else "auto",
        source=answers,
    )


def source_model(model: str, work: Path) -> tuple[Path, Reference]:
    """The source checkpoint and its reference, made once."""
    root = _model_root(work, model)
    folder, answers, telling = root / "source", root / "reference.npz", root / "telling"
    if not telling.exists():
        shutil.rmtree(root, ignore_errors=True)
        models.make(model, folder)
        made = reference(folder)
        save_answers(answers, made.logits, made.routing)
        telling.write_text("\n".join(made.telling))
    logits, experts = load_answers(answers)
    return folder, Reference(logits, experts, tuple(telling.read_text().splitlines()))


def _model_root(work: Path, model: str) -> Path:
    return work / "models" / f"{_slug(model)}-{models.model_key(model)[:12]}"


def _plan_or_refusal(source: Path, recipe: Recipe) -> Plan | str:
    try:
        return stages.plan(stages.pin(str(source)), recipe)
    except InputError as error:
        return str(error)


def _quantize(source: Path, recipe: Recipe, plan: Plan, folder: Path, work: Path) -> None:
    snapshot = stages.pin(str(source))
    calibration = None
    if recipe.needs_calibration:
        workspace = Workspace(work)
        calibration = stages.calibrate(snapshot, plan, recipe, workspace, device="cpu")
    stages.quantize(snapshot, plan, folder, calibration=calibration)


def _with_doubled_scales(folder: Path, plan: Plan, pattern: str) -> Path:
    """A copy of the checkpoint in which the weight scales of the modules that match `pattern` are doubled in place."""
    copy = folder.with_name(f"{folder.name}-doubled")
    shutil.copytree(folder, copy)
    for output in plan.outputs:
        if output.role == "weight_scale" and re.fullmatch(pattern, output.module):
            with (copy / output.shard).open("r+b") as file:
                file.seek(output.begin)
                scales = np.frombuffer(file.read(output.end - output.begin), "<f4")
                file.seek(output.begin)
                file.write((scales * 2).tobytes())
    return copy


def _with_parity(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Cell]]:
    """Candidates whose every tensor has a place in vLLM's model, and finished cells for the others."""
    from fp8pipe.oracle.vllm import ask_vllm

    answers = ask_vllm([candidate.folder for candidate in candidates])
    fitting, rejected = [], []
    for candidate in candidates:
        answer = answers[candidate.folder]
        problems = [answer.refusal] if answer.refusal else [found.sentence() for found in answer.mismatches]
        counts = {"tensors": len(answer.landings), "parameters": len(answer.parameters)}
        cell = candidate.cell.model_copy(update=counts)
        if problems:
            rejected.append(cell.model_copy(update={"message": f"vLLM's model disagrees: {problems[0]}"}))
        else:
            fitting.append(replace(candidate, cell=cell))
    return fitting, rejected


# ---------------------------------------------------------------------------------------------- serving


def _served(candidates: Iterable[Candidate], work: Path) -> Iterator[Cell]:
    controls: dict[str, float | str] = {}
    with VllmChild(work) as vllm:
        for candidate in candidates:
            model = candidate.cell.model
            if model not in controls:
                controls[model] = _control(candidate, vllm)
            yield _compared(candidate, controls[model], vllm)


def _control(candidate: Candidate, vllm: VllmChild) -> float | str:
    """Error of the unquantized source in vLLM, or why vLLM cannot serve it."""
    plain = vllm.answers(candidate.source_folder, "auto")
    if isinstance(plain, str):
        return f"the unquantized source: {plain}"
    rows = _rows_alike(plain[1], candidate.source.routing)
    error = relative_error(plain[0][rows], candidate.source.logits[rows])
    return error if error <= LIMIT else f"the unquantized source: vLLM and transformers disagree by {error:.2f}"


def _compared(candidate: Candidate, control: float | str, vllm: VllmChild) -> Cell:
    if isinstance(control, str):
        return candidate.cell.model_copy(update={"verdict": "unserved", "message": control})
    ours = vllm.answers(candidate.folder, candidate.kv_cache_dtype)
    if isinstance(ours, str):
        return candidate.cell.model_copy(update={"verdict": "unserved", "message": ours})
    doubled = vllm.answers(candidate.doubled, candidate.kv_cache_dtype)
    if isinstance(doubled, str):
        return candidate.cell.model_copy(update={"message": f"only the sabotaged copy is not served: {doubled}"})
    rows = _rows_alike(ours[1], candidate.source.routing)
    error = relative_error(ours[0][rows], candidate.source.logits[rows])
    doubled_error = relative_error(doubled[0][rows], candidate.source.logits[rows])
    found = {"source_error": control, "error": error, "doubled_error": doubled_error}
    counts = {"tokens": int(rows.sum()), "of_tokens": len(rows)}
    return candidate.cell.model_copy(update=found | counts | _verdict(error, doubled_error, float(rows.mean())))


def _verdict(error: float, doubled_error: float, agreeing: float) -> dict[str, str]:
    if agreeing < MIN_AGREEING:
        return {"message": f"only {agreeing:.0%} of the tokens go to the source's experts"}
    if not error <= LIMIT:  # not `>`: NaN must fail
        return {"message": f"logits differ by {error:.2f}"}
    if not doubled_error > LIMIT:
        return {"message": f"the check is blind: with doubled scales logits differ by only {doubled_error:.2f}"}
    return {"verdict": "passed"}


def _rows_alike(ours: np.ndarray | None, theirs: np.ndarray | None) -> np.ndarray:
    """Positions to compare: all of them, or with sparse experts those that every layer sends to the same experts."""
    if ours is None or theirs is None:
        return np.ones(len(PROMPTS) * (len(PROMPTS[0]) - 1), dtype=bool)
    return (ours == theirs).all(axis=(1, 2))


class VllmChild:
    """A vLLM process that serves many checkpoints, started again if it dies."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> VllmChild:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            with self._process:  # closes the pipes
                self._process.kill()

    def answers(self, folder: Path, kv_cache_dtype: str) -> tuple[np.ndarray, np.ndarray | None] | str:
        """(logits, chosen experts), or vLLM's error message."""
        output = self._work / "answers.npz"
        request: dict[str, Any] = {"folder": str(folder), "kv_cache_dtype": kv_cache_dtype, "output": str(output)}
        message = self._ask(request | {"prompts": PROMPTS, "vocabulary": models.VOCABULARY})
        return message or load_answers(output)

    def _ask(self, request: dict[str, Any]) -> str:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if line:
            return json.loads(line)["message"]
        process.wait()
        self._process = None
        tail = (self._work / "vllm.log").read_text(errors="replace").strip().splitlines()[-1:]
        return f"vLLM ended with status {process.returncode}: {' '.join(tail)}"

    def _start(self) -> subprocess.Popen[str]:
        with (self._work / "vllm.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.served.serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
            )
        return self._process


def _slug(model: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", model.lower())
