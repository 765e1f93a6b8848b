"""A checkpoint of this engine against its own records (checks P7 to P9, V11, D7).

In: a Subject with the records that lie in DIR/fp8pipe/. Out: faults. Records let a check be exact where it must
otherwise be tolerant: every byte is known from the source, the plan and the calibration.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import numpy as np
from pydantic import TypeAdapter, ValidationError

from fp8pipe.model.untrusted import clip, parse_json
from fp8pipe.quantize.plan.record import OutputTensor, Plan
from fp8pipe.records import RECORD_DIR, Checkpoint, Manifest, Record
from fp8pipe.records.calibration import Calibration
from fp8pipe.validate.findings import Fault, check
from fp8pipe.validate.place import Place

if TYPE_CHECKING:
    from fp8pipe.validate.compare import Comparison
    from fp8pipe.validate.subject import Subject

MAX_RECORD_BYTES = 256_000_000
"""A plan of 100 000 tensors is 50 MB."""
MAX_PART_VALUES = 20_000
"""JSON values in one entry of a record's long fields, or in one of its other fields."""
CHUNK = 1 << 22


@dataclass(frozen=True)
class Evidence:
    """The engine's records beside a finished checkpoint."""

    checkpoint: Checkpoint
    plan: Plan | None
    calibration: Calibration | None
    manifest: Manifest | None
    unreadable: tuple[str, ...]
    """Records that are there and are none, with the reason."""


R = TypeVar("R", bound=Record)


def read_evidence(place: Place) -> Evidence | None:
    """The records of a checkpoint that this engine finished, None for all others."""
    unreadable: list[str] = []

    def load(kind: type[R], file: str) -> R | None:
        name = f"{RECORD_DIR}/{file}"
        if name not in place.sizes:
            return None
        if place.sizes[name] > MAX_RECORD_BYTES:
            unreadable.append(f"{name}: {place.sizes[name]} bytes")
            return None
        record, problem = _parsed(kind, place.read(name, 0, place.sizes[name]))
        if problem:
            unreadable.append(f"{name}: {problem}")
        return record

    checkpoint = load(Checkpoint, "checkpoint.json")
    if checkpoint is None:
        return None
    plan, calibration = load(Plan, "plan.json"), load(Calibration, "calibration.json")
    return Evidence(checkpoint, plan, calibration, load(Manifest, "manifest.json"), tuple(unreadable))


def _parsed(kind: type[R], data: bytes) -> tuple[R | None, str]:
    """The record and "", or None and why it is none.

    Parts are judged before the whole, up to the first that is wrong: pydantic keeps a kilobyte for each mistake, and
    finds eight in the three bytes of `{},`.
    """
    value, problem = parse_json(data)
    if problem is not None or not isinstance(value, dict):
        return None, problem or "not an object"
    if unknown := value.keys() - kind.model_fields.keys():
        return None, f"{min(unknown)}: a {kind.__name__} has no such field"
    where = ""
    try:
        for where, annotation, part in _parts(kind, value):
            if annotation is not Any and _is_larger_than(part, MAX_PART_VALUES):
                return None, f"{where}: more than {MAX_PART_VALUES} values"
            _adapter(annotation).validate_python(part)
        where = ""
        return kind.model_validate_json(data), ""
    except ValidationError as error:
        first = error.errors()[0]
        return None, f"{'.'.join([where, *map(str, first['loc'])]).strip('.')}: {first['msg']}"


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _parts(kind: type[Record], value: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(place, type, content) of what can be judged alone: the entries of long fields, and other fields whole."""
    for name, field in kind.model_fields.items():
        if name not in value:
            continue
        content, origin, inner = value[name], get_origin(field.annotation), get_args(field.annotation)
        if origin is tuple and inner[1:] == (...,) and isinstance(content, list):
            yield from ((f"{name}.{place}", inner[0], part) for place, part in enumerate(content))
        elif origin is dict and isinstance(content, dict):
            yield from ((f"{name}.{key}", inner[1], part) for key, part in content.items())
        else:
            yield name, field.annotation, content


def _is_larger_than(value: Any, limit: int) -> bool:
    """Whether a JSON value holds more than `limit` others."""
    waiting, count = [value], 0
    while waiting and count <= limit:
        item = waiting.pop()
        if isinstance(item, dict | list):
            count += len(item)
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return count > limit


def _evidence(subject: Subject) -> Evidence:
    assert subject.evidence is not None
    return subject.evidence


def _plan(subject: Subject) -> Plan:
    plan = _evidence(subject).plan
    assert plan is not None
    return plan


# ---------------------------------------------------------------------------------------------- records and files


@check(
    "P7",
    "The engine's records agree with each other and with the source.",
    consequence="none in vLLM; nobody can tell what this checkpoint was made from",
    remedy="quantize again into an empty folder; name the source at the revision that the record names",
)
def records_agree(subject: Subject) -> Iterator[Fault]:
    evidence = subject.evidence
    if evidence is None:
        return
    for reason in evidence.unreadable:
        yield Fault("a record that can be read", clip(reason), file=reason.split(":")[0], severity="warning")
    record, file = evidence.checkpoint, f"{RECORD_DIR}/checkpoint.json"
    if evidence.plan is not None and evidence.plan.source_commit != record.source_commit:
        yield Fault(f"source commit {record.source_commit}", evidence.plan.source_commit, f"{RECORD_DIR}/plan.json")
    if evidence.calibration is not None and evidence.calibration.digest() != record.calibration_digest:
        found = f"{evidence.calibration.digest()[:16]}..."
        yield Fault(f"calibration digest {record.calibration_digest}", found, f"{RECORD_DIR}/calibration.json")
    named = (record.source_commit, subject.source_commit)
    if None not in named and not any(str(one).startswith("local-") for one in named) and named[0] != named[1]:
        yield Fault(f"a source at {record.source_commit}", f"one at {subject.source_commit}", file)
    if evidence.manifest is not None and evidence.manifest.fingerprint != record.fingerprint:
        found = f"one of {evidence.manifest.fingerprint[:12]}"
        manifest = f"{RECORD_DIR}/manifest.json"
        yield Fault(f"a manifest of {record.fingerprint[:12]}", found, manifest, severity="warning")


@check(
    "P8",
    "Weight files have the sizes that the plan computed before the first byte was written.",
    needs=("records",),
    consequence="vLLM stops on it, or loads a checkpoint that is not the planned one",
    remedy="quantize again into an empty folder",
)
def sizes_are_as_planned(subject: Subject) -> Iterator[Fault]:
    sizes = subject.shelf.sizes
    told = {fault.file for faults in subject.shelf.faults.values() for fault in faults}
    for name, outputs in _plan(subject).shards().items():
        planned = max(output.end for output in outputs)
        if name in sizes and sizes[name] != planned and name not in told:
            yield Fault(f"{planned} bytes, as planned", f"{sizes[name]} bytes", file=name)


@check(
    "P9",
    "Every published file has the sha256 that the manifest names.",
    depth="values",
    needs=("manifest",),
    consequence="vLLM loads it; these are not the bytes that were measured and published",
    remedy="download the file again, or publish again",
)
def files_are_those_of_the_manifest(subject: Subject) -> Iterator[Fault]:
    """Without the records and the card, which later stages may write again."""
    evidence = _evidence(subject)
    assert evidence.manifest is not None
    if evidence.manifest.fingerprint != evidence.checkpoint.fingerprint:
        return  # P7's
    files = [f for f in evidence.manifest.files if not f.name.startswith(f"{RECORD_DIR}/") and f.name != "README.md"]
    place = subject.shelf.place
    present = [file for file in files if place.sizes.get(file.name) == file.size]
    for file in files:
        if file.name not in place.sizes:
            yield Fault("the file", "missing", file=file.name)
        elif place.sizes[file.name] != file.size:
            yield Fault(f"{file.size} bytes", f"{place.sizes[file.name]} bytes", file=file.name)
    with ThreadPoolExecutor(thread_name_prefix="sha256") as pool:
        hashes = pool.map(lambda file: _sha256(place, file.name), present)
        for file, found in zip(present, hashes, strict=True):
            if found != file.sha256:
                yield Fault(f"sha256 {file.sha256[:16]}...", f"{found[:16]}...", file=file.name)


def _sha256(place: Place, name: str) -> str:
    digest = hashlib.sha256()
    for begin in range(0, place.sizes[name], CHUNK):
        digest.update(place.read(name, begin, begin + CHUNK))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- exact values


@check(
    "V11",
    "Input and KV scales are the ranges of calibration.json, divided by 448, to the last bit.",
    depth="values",
    needs=("records", "calibration"),
    consequence="vLLM clips activations or keys and values, or rounds them too coarsely, without a word",
    remedy="quantize again with this calibration",
)
def scales_are_those_of_the_calibration(subject: Subject) -> Iterator[Fault]:
    assert subject.measured is not None
    for output, amax in _calibrated(subject):
        scale = subject.measured.scales.get(output.name)
        if scale is None or scale.values is None:
            continue  # K2's and K7's
        found = scale.values.ravel()
        expected = np.maximum(np.array(amax, np.float32), np.float32(1e-12)) / np.float32(448)
        if found.shape != expected.shape:
            yield Fault(f"{expected.size} values", f"{found.size}", scale.entry.shard, output.name)
        elif (other := found != expected).any():
            at = int(np.flatnonzero(other)[0])
            wanted = f"{float(expected[at])!r} from the range {amax[at]!r}"
            yield Fault(wanted, f"{float(found[at])!r}", scale.entry.shard, output.name)


def _calibrated(subject: Subject) -> Iterator[tuple[OutputTensor, tuple[float, ...]]]:
    """Every calibrated scale of the plan with its ranges; of a fused group the largest counts for all members."""
    calibration, plan = _evidence(subject).calibration, _plan(subject)
    assert calibration is not None
    largest: dict[str, float] = defaultdict(lambda: -math.inf)
    for output in plan.outputs:
        if output.role == "input_scale":
            key = output.group or output.module
            largest[key] = max(largest[key], calibration.inputs.get(output.module, -math.inf))
    for output in plan.outputs:
        if output.role == "input_scale":
            yield output, (largest[output.group or output.module],)
        elif output.role in ("k_scale", "v_scale") and (ranges := calibration.kv.get(output.source)) is not None:
            yield output, ranges.k_amax if output.role == "k_scale" else ranges.v_amax


@check(
    "D7",
    "A checkpoint of this engine equals its requantization from the source, bit for bit.",
    depth="fidelity",
    needs=("scheme", "source", "records"),
    consequence="vLLM serves it; these are not the bytes that the record speaks of",
    remedy="quantize again into an empty folder",
)
def bytes_are_those_of_the_engine(subject: Subject) -> Iterator[Fault]:
    assert subject.measured is not None
    for output in _plan(subject).outputs:
        comparison = subject.measured.comparisons.get(output.name)
        if output.role != "weight" or comparison is None:
            continue
        if comparison.unequal:
            found = f"{comparison.unequal} other codes"
            yield Fault(f"the codes of the engine, all {comparison.count}", found, comparison.entry.shard, output.name)
        elif inexact := _inexact_units(subject, output, comparison):
            name = f"{output.module}.{comparison.spec.scale}"
            yield Fault("the scales of the engine", f"{inexact} others", comparison.entry.shard, name)


def _inexact_units(subject: Subject, output: OutputTensor, comparison: Comparison) -> int:
    """Units whose scale the engine would not have chosen."""
    from fp8pipe.validate.compare import engine_scales
    from fp8pipe.validate.values import weight_scale_of

    if comparison.spec.strategy != "tensor":
        return comparison.foreign_scales
    members = [other.name for other in _plan(subject).outputs if other.role == "weight" and _together(other, output)]
    assert subject.measured is not None
    known = [c.amax for name in members if (c := subject.measured.comparisons.get(name)) is not None]
    scale = weight_scale_of(subject, output.module)
    if scale is None or len(known) < len(members):
        return 0
    return int(np.float32(scale) not in engine_scales(np.float32(max(known)), comparison.spec))


def _together(one: OutputTensor, other: OutputTensor) -> bool:
    return one.name == other.name or (one.group != "" and one.group == other.group)
