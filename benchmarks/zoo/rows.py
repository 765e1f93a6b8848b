"""One architecture: built, quantized, validated, loaded by transformers, its logits compared.

In: a name, and recipes. Out: a `Row`. Everything runs in this process, so that transformers is imported once for all
architectures; what fp8pipe does in child processes is called as the same functions.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.zoo import hooks, logits, models, predictors
from fp8pipe.calibrate import calibrate
from fp8pipe.calibrate.dataset import files_of, read_rows
from fp8pipe.calibrate.samples import Samples, choose_samples, context_of
from fp8pipe.calibrate.tokenization import tokenizer_of
from fp8pipe.config import Recipe
from fp8pipe.errors import Fp8PipeError, UnsupportedArchitecture
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.architecture import Architecture
from fp8pipe.oracle import transformers_probe
from fp8pipe.oracle.loaded import Loaded
from fp8pipe.oracle.loaded_probe import Side, compare_loaded
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import make_plan
from fp8pipe.records import Snapshot
from fp8pipe.records.calibration import Calibration
from fp8pipe.validate import validate


@dataclass
class Cell:
    """One architecture under one recipe."""

    exit_code: int = 0
    """0: quantized. Others: fp8pipe's own exit code."""
    message: str = ""
    errors: list[str] = field(default_factory=list)
    """What validate found."""
    warnings: list[str] = field(default_factory=list)
    share: float = 0.0
    """Of the parameters of the decoder layers' Linears and experts, how many are FP8."""
    weight_error: float = 0.0
    """The worst quantized parameter's error through transformers' loader."""
    kept_error: float = 0.0
    """The same of parameters that are not quantized: must be 0."""
    faults: list[str] = field(default_factory=list)
    """Parameters that one side does not fill."""
    incomparable: list[str] = field(default_factory=list)
    logits_error: float | None = None
    inputs: int = 0
    """Static ranges of inputs that were held against plain hooks, and the largest relative difference."""
    input_error: float = 0.0
    kv: int = 0
    """The same of keys and values."""
    kv_error: float = 0.0
    worst_range: str = ""
    unseen: list[str] = field(default_factory=list)
    """Modules with a static range whose product no hook saw."""
    vllm: str = ""
    """ok, `as source`, or what vLLM's loader says; empty if it was not asked."""
    vllm_builds: bool = True
    """False if vLLM does not take the source either, which is no fault of the checkpoint."""
    predictor: str = ""
    """`kept`: the predicting layer is whole and left out of quantization; else why not; empty if there is none."""
    folder: str = ""


@dataclass
class Row:
    """One architecture."""

    name: str
    model_class: str = ""
    not_built: str = ""
    cells: dict[str, Cell] = field(default_factory=dict)


def make_row(name: str, recipes: Sequence[Recipe], work: Path, report: Callable[[str], None]) -> Row:
    """Build `name` in `work` and put it through every recipe."""
    row = Row(name)
    try:
        model = models.build(name)
    except models.NotBuilt as reason:
        row.not_built = str(reason)
        return row
    row.model_class = type(model).__name__
    source = work / name.replace(":", "-") / "source"
    shutil.rmtree(source.parent, ignore_errors=True)
    try:
        models.save(model, source, name)
        predictor = predictors.add(model, source)
    except Exception as error:  # transformers' own converters meet sizes that they do not know
        row.not_built = f"not saved: {type(error).__name__}: {error}"
        return row
    for recipe in recipes:
        folder = source.with_name(recipe.name)
        row.cells[recipe.name] = cell = Cell(folder=str(folder))
        try:
            _fill(cell, model, source, folder, recipe)
            cell.predictor = predictor and (predictors.kept(folder, predictor) or "kept")
        except Fp8PipeError as error:
            cell.exit_code, cell.message = error.exit_code, str(error).replace(f"{source.parent}/", "")
        except Exception as error:  # whatever else is a defect, which the page is there to show
            frame = traceback.extract_tb(error.__traceback__)[-1]
            cell.exit_code = 5
            cell.message = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        report(f"{name} {recipe.name}: {cell}")
    return row


def _fill(cell: Cell, model: PreTrainedModel, source: Path, folder: Path, recipe: Recipe) -> None:
    snapshot = resolve(str(source))
    architecture = examine(snapshot)
    plan = make_plan(snapshot, read_headers(snapshot), recipe, architecture)
    calibration = _calibration(cell, model, source, recipe) if recipe.needs_calibration else None
    quantize(snapshot, plan, folder, calibration=calibration)
    report = validate(folder, source=snapshot, architecture=architecture)
    cell.errors = [finding.sentence() for finding in report.errors]
    cell.warnings = [finding.sentence() for finding in report.warnings]
    with ExitStack() as stack:
        ours, theirs = (Side(place, read_headers(resolve(str(place))), stack) for place in (folder, source))
        _note_weights(cell, list(compare_loaded(ours, theirs)), model)
        if calibration is None:
            cell.logits_error = logits.error(model, ours, theirs)


def _calibration(cell: Cell, model: PreTrainedModel, source: Path, recipe: Recipe) -> Calibration:
    """The ranges of the source, held against plain hooks.

    Both run in float32: in bfloat16 two orders of the same sums differ by several percent after a few layers."""
    precise = source.with_name(f"{recipe.name}.float32")
    with ExitStack() as stack:
        theirs = Side(source, read_headers(resolve(str(source))), stack)
        logits.put(model.float(), theirs)
        models.save(model, precise, source.parent.name)
        snapshot = resolve(str(precise))
        architecture = examine(snapshot)
        plan = make_plan(snapshot, read_headers(snapshot), recipe, architecture)
        samples = samples_of(snapshot, recipe)
        made = calibrate(snapshot, plan, recipe, precise / "calibration", architecture=architecture, samples=samples)
        origins = {output.module: output.source for output in plan.outputs if output.role == "weight"}
        _note_ranges(cell, hooks.compare(model, made, architecture, theirs, samples.token_ids, origins))
    shutil.rmtree(precise)
    return made.model_copy(update={"source_commit": resolve(str(source)).commit})


def samples_of(snapshot: Snapshot, recipe: Recipe) -> Samples:
    """The samples that calibration runs."""
    spec = recipe.calibration
    tokenizer = tokenizer_of(snapshot.path, trust_remote_code=False)
    return choose_samples(spec, read_rows(files_of(spec, "")), tokenizer, context_of(snapshot.path))


def _note_ranges(cell: Cell, found: hooks.Compared) -> None:
    cell.inputs, cell.input_error = found.inputs, found.input_error
    cell.kv, cell.kv_error = found.kv, found.kv_error
    cell.unseen = list(found.unseen)
    cell.worst_range = found.worst


def examine(snapshot: Snapshot) -> Architecture:
    """What the transformers oracle answers, without a process of its own. Raises UnsupportedArchitecture."""
    shapes = {info.name: list(info.shape) for info in read_headers(snapshot).tensors.values()}
    try:
        return Architecture.model_validate(transformers_probe.examine(snapshot.path, shapes, False))
    except transformers_probe.Unsupported as reason:
        raise UnsupportedArchitecture(str(reason)) from reason


def _note_weights(cell: Cell, loaded: list[Loaded], model: PreTrainedModel) -> None:
    compared = [one for one in loaded if not one.fault and not one.incomparable]
    cell.weight_error = max((one.error for one in compared if one.quantized), default=0.0)
    cell.kept_error = max((one.error for one in compared if not one.quantized), default=0.0)
    vllm_only = any(warning.startswith("R2 ") for warning in cell.warnings)  # names of experts are not transformers'
    unfilled = {one.name for one in loaded if one.fault and vllm_only and ".experts." in one.name}
    cell.faults = [f"{one.name}: {one.fault}" for one in loaded if one.fault and one.name not in unfilled]
    cell.incomparable = [f"{one.name}: {one.incomparable}" for one in loaded if one.incomparable]
    cell.incomparable += (f"{name}: only vLLM knows its experts' names" for name in sorted(unfilled))
    linears = linear_parameters(model)
    total = sum(linears.values())
    quantized = {one.name for one in loaded if one.quantized}
    cell.share = sum(size for name, size in linears.items() if name in quantized) / total if total else 0.0


def linear_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Weights of Linears, and 3-D weights of experts, in the decoder without its head: name -> number of elements."""
    decoder = model.get_decoder() or model
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            is_weight = isinstance(module, torch.nn.Linear) and leaf == "weight"
            is_experts = parameter.dim() == 3 and "Conv" not in type(module).__name__
            inside = f"{name}.".startswith(f"{prefix}." if prefix else "") and module is not head
            if inside and (is_weight or is_experts):
                found[f"{name}.{leaf}"] = parameter.numel()
    return found


WORST_WEIGHT, WORST_RANGE, WORST_LOGITS = 0.06, 0.01, 0.25
"""Largest relative errors that are right: of a weight (E4M3 costs 0.026), of a static range, of logits."""


def unproven(cell: Cell) -> str:
    """Why nothing proves the cell, though nothing is wrong: a weight was compared neither by itself nor by its effect
    on the logits."""
    if cell.exit_code or cell.logits_error is not None or wrong(cell) or not cell.incomparable:
        return ""
    return f"not compared: {cell.incomparable[0]}"


def wrong(cell: Cell) -> str:
    """Why the cell is wrong; empty if it is right, or refused with a reason."""
    if cell.exit_code:
        return cell.message if cell.exit_code != 2 else ""
    found = [*cell.errors, *cell.faults, *(f"{name}: its product was not seen" for name in cell.unseen)]
    if not cell.weight_error <= WORST_WEIGHT or cell.kept_error:
        found.append(f"weights differ by {max(cell.weight_error, cell.kept_error):.3g}")
    if not max(cell.input_error, cell.kv_error) <= WORST_RANGE:
        found.append(f"{cell.worst_range}: its range differs by {max(cell.input_error, cell.kv_error):.1%}")
    if cell.logits_error is not None and not cell.logits_error <= WORST_LOGITS:
        found.append(f"logits differ by {cell.logits_error:.2f}")
    if cell.vllm_builds and cell.vllm not in ("", "ok", "as source"):
        found.append(f"vLLM: {cell.vllm}")
    if cell.predictor not in ("", "kept"):
        found.append(f"predicting layer: {cell.predictor}")
    return found[0] if found else ""
