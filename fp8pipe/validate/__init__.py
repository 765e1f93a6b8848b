"""Nothing broken reaches a GPU or a user: every invariant of an FP8 checkpoint, checked, all findings in one run.

In: a checkpoint, in a folder or on the Hub; with it, when at hand, the source it was made from and the architecture
record. Out: a ValidationReport. Bad content is never an exception: it is a finding that says file, tensor, expected,
found, what vLLM would do, and the remedy.

    headers   files, index, config, coverage, shapes: reads headers and small files, from the Hub by HTTP ranges
    values    + every byte once: NaN, unusable scales, unused range
    fidelity  + the source once: every code against source / scale, every other tensor byte for byte

    place, untrusted, shelf     what can be read of it
    scheme, patterns, layout    what config and architecture say it should be
    measure, units, compare     the pass over the bytes
    files, config, coverage, kv, shapes, values, fidelity, package, evidence, runtime    the checks (table: `findings`)
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fp8pipe.errors import EngineFailed, InputError, ModelNotFound
from fp8pipe.model.headers import Headers
from fp8pipe.progress import Progress, quiet
from fp8pipe.records import Snapshot, SourceFile, ValidationReport
from fp8pipe.validate import config as config_room
from fp8pipe.validate import coverage, evidence, files, kv, package, runtime, shapes
from fp8pipe.validate.findings import CHECKS, DEPTHS, Check, Depth
from fp8pipe.validate.layout import Layout, layout_from_architecture, layout_from_names, unquantized_names
from fp8pipe.validate.place import HubPlace, Place, place_of
from fp8pipe.validate.scheme import quantization_config, read_scheme
from fp8pipe.validate.shelf import Shelf, open_shelf
from fp8pipe.validate.subject import Subject

if TYPE_CHECKING:
    from fp8pipe.model.architecture import Architecture
    from fp8pipe.oracle.vllm import Mismatch

log = logging.getLogger(__name__)

UNREADABLE = {"F1", "F2", "F9"}
"""Checks whose faults mean that there is no whole set of weight files."""

__all__ = ["CHECKS", "UNREADABLE", "Check", "Depth", "all_checks", "validate"]


def validate(
    checkpoint: Path | Snapshot,
    *,
    source: Snapshot | None = None,
    architecture: Architecture | None = None,
    depth: Depth | None = None,
    oracles: bool = False,
    progress: Progress = quiet,
) -> ValidationReport:
    """All findings on `checkpoint`: a folder, or a snapshot that may still be on the Hub.

    `source`: the model it was made from, on disk unless depth is headers. `architecture`: the source's record, looked
    up when there is a source; without it, names and shapes decide what is a Linear. `depth`: as deep as what is at hand
    allows, unless given. `oracles`: ask transformers, where there is no source, which weights are Linear, and vLLM,
    where it is installed, where its own loader puts each tensor; both build the model on the meta device in a child
    process, which takes half a minute. Raises InputError when the folder is none, or the depth needs what is not there;
    never on what lies in the checkpoint.
    """
    if isinstance(checkpoint, Path) and not checkpoint.is_dir():
        raise ModelNotFound(f"{checkpoint}: no such folder; give the folder that holds config.json and the weights")
    place = place_of(checkpoint)
    depth = _depth(place, source, depth)
    subject = _read(place, source, architecture, oracles=oracles)
    if oracles:
        subject.vllm = _ask_vllm(subject)
    checks = _runnable(subject, depth)
    if depth != "headers":
        from fp8pipe.validate.measure import measure

        subject.measured = measure(subject, with_source=depth == "fidelity", progress=progress)
    findings = tuple(finding for check in checks for finding in check.findings(subject))
    return ValidationReport(
        folder_identity=place.identity(),
        depth=depth,
        known_from="architecture" if subject.layout and subject.layout.from_record else "names",
        checks=tuple(check.id for check in checks),
        findings=findings,
        tensors=len(subject.shelf.tensors),
        bytes_read=subject.measured.bytes_read if subject.measured else 0,
    )


def all_checks() -> tuple[Check, ...]:
    """The whole table, in the order in which checks run: what the documentation is made from."""
    from fp8pipe.validate import fidelity, values

    return _in_order(files, config_room, coverage, kv, shapes, values, fidelity, package, evidence, runtime)


def _header_checks() -> tuple[Check, ...]:
    """Those of the rooms that need no torch, whose import takes longer than all of them."""
    return _in_order(files, config_room, coverage, kv, shapes, package, evidence, runtime)


def _in_order(*rooms: ModuleType) -> tuple[Check, ...]:
    order = {room.__name__: place for place, room in enumerate(rooms)}
    known = [check for check in CHECKS.values() if check.run.__module__ in order]
    return tuple(sorted(known, key=lambda check: order[check.run.__module__]))


def _depth(place: Place, source: Snapshot | None, wanted: Depth | None) -> Depth:
    """How deep to go: `wanted`, if what is at hand allows it."""
    is_here = place.root is not None
    source_is_here = source is not None and source.root is not None
    if wanted == "fidelity" and source is None:
        raise InputError("depth fidelity compares with the source: name it (--source)")
    if (wanted in ("values", "fidelity") and not is_here) or (wanted == "fidelity" and not source_is_here):
        raise InputError(f"depth {wanted} reads every byte: download checkpoint and source first")
    if wanted is not None:
        return wanted
    return "headers" if not is_here else "fidelity" if source_is_here else "values"


def _read(place: Place, source: Snapshot | None, architecture: Architecture | None, *, oracles: bool) -> Subject:
    """Headers and configs of both sides."""
    shelf = open_shelf(place)
    theirs = open_shelf(place_of(source)) if source else None
    if architecture is None and source is not None:
        architecture = _inspect(source, None)
    elif architecture is None and oracles:
        architecture = _inspect(_as_snapshot(place), Headers((), unquantized_names(shelf.tensors)))
    config, problem = _read_object(shelf, config_room.CONFIG)
    source_config = _read_object(theirs, config_room.CONFIG)[0] if theirs else None
    quantization, file = _quantization(shelf, config)
    scheme, layout = read_scheme(quantization), _layout(theirs or shelf, source_config or config, architecture)
    if scheme is not None and layout is not None:
        scheme.match_all(layout.modules)
    return Subject(
        shelf=shelf,
        config=config,
        config_problem=problem,
        quantization=quantization,
        quantization_file=file,
        scheme=scheme,
        layout=layout,
        source=theirs,
        source_config=source_config,
        source_commit=source.commit if source else None,
        evidence=evidence.read_evidence(place),
    )


def _inspect(model: Snapshot, headers: Headers | None) -> Architecture | None:
    """The model's record; None when transformers cannot build it, and the report says `known_from: names`."""
    from fp8pipe.oracle.transformers import inspect

    try:
        return inspect(model, headers=headers)
    except InputError as error:
        log.warning("no architecture record, names and shapes decide: %s", error)
        return None


def _as_snapshot(place: Place) -> Snapshot:
    """Enough of one to read config.json through it."""
    if isinstance(place, HubPlace):
        return place.snapshot
    files = (SourceFile(name=config_room.CONFIG, size=place.sizes.get(config_room.CONFIG, 0)),)
    return Snapshot(model_id="checkpoint", commit="local-checkpoint", files=files, root=str(place.root))


def _ask_vllm(subject: Subject) -> tuple[Mismatch, ...] | None:
    """What vLLM's loader disagrees with; None where it cannot be asked, which is said."""
    from fp8pipe.oracle.vllm import is_available, parity

    folder, reason = subject.shelf.place.root, ""
    if not is_available():
        reason = "vLLM is not installed here"
    elif folder is None:
        reason = "it reads a folder, and this checkpoint is on the Hub: download it first (--depth values)"
    elif subject.config is None:
        reason = f"{config_room.CONFIG}: {subject.config_problem} (C1)"
    elif broken := sorted(UNREADABLE & subject.shelf.faults.keys()):
        reason = f"there is no whole set of weight files ({', '.join(broken)})"
    else:
        try:
            return parity(folder, subject.shelf.tensors)
        except EngineFailed as error:
            reason = str(error)
    log.warning("vLLM's own loader gave no answer, R1 did not run: %s", reason)
    return None


def _read_object(shelf: Shelf, name: str) -> tuple[dict[str, Any] | None, str | None]:
    """A JSON object, or why it is none."""
    if name not in shelf.sizes:
        return None, f"no {name}"
    content, problem = shelf.json(name)
    if content is not None and not isinstance(content, dict):
        return None, f"a {type(content).__name__}"
    return content, problem


def _quantization(shelf: Shelf, config: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
    """The quantization_config, and the file it stands in: config.json, else what ModelOpt writes beside it."""
    known = quantization_config(config) if config is not None else None
    if known is None and config is not None and "quantization_config" not in config:
        legacy, _ = _read_object(shelf, config_room.HF_QUANT_CONFIG)
        if legacy is not None:
            return {"quant_method": "modelopt"} | legacy, config_room.HF_QUANT_CONFIG
    return known, config_room.CONFIG


def _layout(shelf: Shelf, config: dict[str, Any] | None, architecture: Architecture | None) -> Layout | None:
    if config is None:
        return None
    if architecture is not None:
        return layout_from_architecture(architecture, shelf.tensors, config)
    return layout_from_names(shelf.tensors, config)


def _runnable(subject: Subject, depth: Depth) -> list[Check]:
    """Checks within `depth` that have what they need. The report lists them: what did not run proves nothing."""
    reach = DEPTHS[: DEPTHS.index(depth) + 1]
    checks = _header_checks() if depth == "headers" else all_checks()
    return [check for check in checks if check.depth in reach and all(map(subject.supplies, check.needs))]
