"""Nothing broken reaches a GPU or a user: every invariant of an FP8 checkpoint, checked, all findings in one run.

In: a checkpoint folder; with it, when at hand, the source it was made from and the architecture record. Out: a
ValidationReport. Bad content is never an exception: it is a finding that says file, tensor, expected, found, what vLLM
would do, and the remedy.

    headers   files, index, config, coverage, shapes: reads headers and small files
    values    + every byte once: NaN, unusable scales, unused range
    fidelity  + the source once: every code against source / scale, every other tensor byte for byte
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.errors import InputError, ModelNotFound
from fp8pipe.identity import folder_identity
from fp8pipe.progress import Progress, quiet
from fp8pipe.records import Snapshot, ValidationReport
from fp8pipe.validate import config as config_room
from fp8pipe.validate import coverage, files, package, shapes
from fp8pipe.validate.findings import CHECKS, DEPTHS, Check, Depth
from fp8pipe.validate.layout import Layout, layout_from_architecture, layout_from_names
from fp8pipe.validate.subject import Subject

if TYPE_CHECKING:
    from fp8pipe.architecture import Architecture

log = logging.getLogger(__name__)

__all__ = ["CHECKS", "Check", "Depth", "all_checks", "validate"]


def validate(
    folder: Path,
    *,
    source: Snapshot | None = None,
    architecture: Architecture | None = None,
    depth: Depth | None = None,
    progress: Progress = quiet,
) -> ValidationReport:
    """All findings on the checkpoint in `folder`.

    `source`: the downloaded model it was made from. `architecture`: the source's record, looked up when there is a
    source; without it, names and shapes decide what is a Linear. `depth`: as deep as what is at hand allows, unless
    given. Raises InputError when `folder` is no folder or fidelity is asked for without a source; never on what lies in
    the folder.
    """
    if not folder.is_dir():
        raise ModelNotFound(f"{folder}: no such folder; give the folder that holds config.json and the weights")
    if depth == "fidelity" and source is None:
        raise InputError("depth fidelity compares with the source: name it (--source)")
    depth = depth or ("fidelity" if source else "values")
    subject = _read(folder, source, architecture)
    checks = _runnable(subject, depth)
    if depth != "headers":
        from fp8pipe.validate.values import measure

        subject.measured = measure(subject, with_source=depth == "fidelity", progress=progress)
    findings = tuple(finding for check in checks for finding in check.findings(subject))
    return ValidationReport(
        folder_identity=folder_identity(folder),
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

    rooms = (files, config_room, coverage, shapes, values, fidelity, package)
    order = {room.__name__: place for place, room in enumerate(rooms)}
    return tuple(sorted(CHECKS.values(), key=lambda check: order[check.run.__module__]))


def _read(folder: Path, source: Snapshot | None, architecture: Architecture | None) -> Subject:
    """Headers and configs of both sides."""
    shelf = files.open_shelf(folder)
    theirs = files.open_shelf(source.path) if source else None
    architecture = architecture or (_inspect(source) if source else None)
    config, problem = _read_config(folder)
    source_config = _read_config(source.path)[0] if source else None
    return Subject(
        shelf=shelf,
        config=config,
        config_problem=problem,
        scheme=config_room.read_scheme(config) if config is not None else None,
        layout=_layout(theirs or shelf, source_config or config, architecture),
        source=theirs,
        source_config=source_config,
    )


def _inspect(source: Snapshot) -> Architecture | None:
    """The source's record; None when transformers cannot build the model, and the report says `known_from: names`."""
    from fp8pipe.architecture import inspect

    try:
        return inspect(source)
    except InputError as error:
        log.warning("no architecture record, names and shapes decide: %s", error)
        return None


def _read_config(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    if not (folder / config_room.CONFIG).is_file():
        return None, "no config.json"
    content, problem = files.read_json(folder / config_room.CONFIG)
    if content is not None and not isinstance(content, dict):
        return None, f"a {type(content).__name__}"
    return content, problem


def _layout(shelf: files.Shelf, config: dict[str, Any] | None, architecture: Architecture | None) -> Layout | None:
    if config is None:
        return None
    if architecture is not None:
        return layout_from_architecture(architecture, shelf.tensors, config)
    return layout_from_names(shelf.tensors, config)


def _runnable(subject: Subject, depth: Depth) -> list[Check]:
    """Checks within `depth` that have what they need. The report lists them: what did not run proves nothing."""
    reach = DEPTHS[: DEPTHS.index(depth) + 1]
    return [check for check in all_checks() if check.depth in reach and all(map(subject.supplies, check.needs))]
