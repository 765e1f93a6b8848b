"""Finds everything that is wrong with an FP8 checkpoint before it reaches a GPU or a user, in one run.

In: a checkpoint, in a folder or on the Hub; if available, the source it was made from and the architecture record.
Out: a ValidationReport. Bad content is never an exception: it is a finding that names file, tensor, expected, found,
what vLLM would do, and the remedy.

    headers   files, index, config, coverage, shapes: reads headers and small files, from the Hub by HTTP ranges
    values    + every byte once: NaN, unusable scales, unused range
    fidelity  + the source once: every code against source / scale, every other tensor byte for byte
    loaded    + both through transformers' own loader: every parameter of its model, dequantized

    registry    the checks in the order in which they run
    checks/     one file for each letter of their ids
    reading/    what is in the folder or repository: files, headers, records
    meaning/    what config and names say it should be: formats, scheme, layout
    measuring/  the pass over the bytes
    asking      vLLM's own model and loader, asked about a checkpoint
    planned     the same, about a checkpoint that is only planned
    serving/    what will serve the checkpoint, and as what
    subject     all of that, as a check sees it; `prepare` reads it, `runner` runs the checks on it
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fp8pipe.errors import EnvironmentFault, InputError, ModelNotFound, SourceChanged
from fp8pipe.model.identity import content_hashes, identity_of
from fp8pipe.progress import Progress, quiet
from fp8pipe.records import DEPTHS, Depth, FileHash, Snapshot, ValidationReport
from fp8pipe.validate.asking import UNREADABLE
from fp8pipe.validate.prepare import read_subject
from fp8pipe.validate.reading.place import FolderPlace, HubPlace, Place, place_of
from fp8pipe.validate.registry import all_checks, header_checks
from fp8pipe.validate.runner import run
from fp8pipe.validate.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8pipe.model.architecture import Architecture
    from fp8pipe.oracle.loaded import Loaded
    from fp8pipe.records.serving import Serving
    from fp8pipe.records.validation import Finding

_WITH_SOURCE = frozenset(("fidelity", "loaded"))
"""Depths that read the source's bytes."""

__all__ = ["UNREADABLE", "Depth", "all_checks", "validate"]


def validate(
    checkpoint: Path | Snapshot,
    *,
    source: Snapshot | None = None,
    architecture: Architecture | None = None,
    depth: Depth | None = None,
    oracles: bool | None = False,
    progress: Progress = quiet,
) -> ValidationReport:
    """All findings on `checkpoint`: a folder, or a snapshot that may still be on the Hub.

    `source`: the model it was made from, on disk unless depth is headers. `architecture`: the source's record; it is
    looked up if there is a source, and without either names and shapes decide what is a Linear. `depth`: by default as
    deep as what is on disk allows. `oracles`: None asks vLLM, where it is installed, what its own loader does with each
    tensor; True demands that, and asks transformers, if there is no source, which weights are Linear. Each builds the
    model on the meta device in a child process, half a minute for both, and its answer is kept.

    Raises InputError if there is no such folder, or if the depth needs files that are not on disk; SourceChanged if the
    folder is altered meanwhile; EngineFailed if vLLM is demanded and not (wholly) installed; never because of what is
    in the checkpoint.
    """
    if isinstance(checkpoint, Path) and not checkpoint.is_dir():
        raise ModelNotFound(f"{checkpoint}: no such folder; give the folder that holds config.json and the weights")
    place = place_of(checkpoint)
    depth = _depth(place, source, depth)
    content = _content(place, depth)
    subject = read_subject(place, source, architecture, oracles=oracles)
    if depth != "headers":
        from fp8pipe.validate.measuring.measure import measure

        subject.measured_or_none = measure(subject, with_source=depth in _WITH_SOURCE, progress=progress)
    loaded_silent = ""
    if depth == "loaded":
        subject.loaded_or_none, loaded_silent = _loaded(subject)
        depth = "fidelity" if loaded_silent else depth
    reach = DEPTHS[: DEPTHS.index(depth) + 1]
    known = header_checks() if depth == "headers" else all_checks()
    checks = [check for check in known if check.depth in reach and all(map(subject.supplies, check.needs))]
    findings = tuple(run(checks, subject))
    if _content(place, depth) != content:
        raise SourceChanged(
            f"{place.root}: altered while it was validated; run again once nothing writes to the folder"
        )
    return ValidationReport(
        folder_identity=_identity(place, content),
        files=content or (),
        depth=depth,
        known_from="architecture" if subject.layout.from_record else "names",
        checks=tuple(check.id for check in checks),
        findings=findings,
        tensors=len(subject.files.tensors),
        bytes_read=subject.measured.bytes_read if depth != "headers" else 0,
        vllm=subject.vllm.version,
        vllm_silent=subject.vllm.silent,
        loaded_silent=loaded_silent,
        serving=_serving(subject, findings),
    )


def _content(place: Place, depth: Depth) -> tuple[FileHash, ...] | None:
    """The hashes of a folder's content; None if only its headers are read. The Hub has hashes of its own."""
    return content_hashes(place.root) if isinstance(place, FolderPlace) and depth != "headers" else None


def _identity(place: Place, content: tuple[FileHash, ...] | None) -> str | None:
    if isinstance(place, HubPlace):
        return place.snapshot.commit
    return None if content is None else identity_of(content)


def _serving(subject: Subject, findings: Sequence[Finding]) -> Serving | None:
    """By rule, unless vLLM itself was asked and does not read the checkpoint."""
    from fp8pipe.validate.serving import what_serves

    serving = what_serves(subject.config, subject.scheme_or_none, subject.files.tensors)
    unread = next((finding for finding in findings if finding.check == "R1" and finding.severity == "error"), None)
    if serving is None or unread is None:
        return serving
    return serving.without_vllm(f"vLLM {subject.vllm.version} was asked and does not read it whole: see R1")


def _loaded(subject: Subject) -> tuple[tuple[Loaded, ...] | None, str]:
    """What transformers' loader makes of both sides, or why there is no answer: what was found before stays found."""
    from fp8pipe.oracle.loaded import compare

    ours, theirs = subject.files, subject.source
    assert ours.place.root is not None and theirs.place.root is not None, "_depth has checked it"
    for side in (ours, theirs):
        if broken := sorted(UNREADABLE & side.faults.keys()):
            return None, f"{side.place.root}: there is no whole set of weight files ({', '.join(broken)})"
    try:
        return compare(ours.place.root, theirs.place.root, [ours.tensors, theirs.tensors]), ""
    except EnvironmentFault as error:
        return None, str(error)


def _depth(place: Place, source: Snapshot | None, wanted: Depth | None) -> Depth:
    """`wanted`, if the files that it needs are on disk; else as deep as possible."""
    is_here = place.root is not None
    source_is_here = source is not None and source.root is not None
    if wanted in _WITH_SOURCE and source is None:
        raise InputError(f"depth {wanted} compares with the source: name it (--source)")
    if (wanted not in (None, "headers") and not is_here) or (wanted in _WITH_SOURCE and not source_is_here):
        raise InputError(f"depth {wanted} reads every byte: download checkpoint and source first")
    if wanted is not None:
        return wanted
    return "headers" if not is_here else "fidelity" if source_is_here else "values"
