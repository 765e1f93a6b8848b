"""The engine's records beside a checkpoint (DIR/fp8pipe/), read as untrusted input.

With them a check can be exact where it must otherwise be tolerant: source, plan and calibration determine every byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from fp8pipe.model.untrusted import parse_json
from fp8pipe.quantize.plan.record import Plan
from fp8pipe.records import RECORD_DIR, Checkpoint, Manifest, Record, Snapshot
from fp8pipe.records.calibration import Calibration
from fp8pipe.validate.reading.place import Place

MAX_RECORD_BYTES = 256_000_000
"""A plan of 100 000 tensors is 50 MB."""
MAX_PART_VALUES = 20_000
"""JSON values in one entry of a record's long fields, or in one of its other fields."""


@dataclass(frozen=True)
class EngineRecords:
    """The engine's records beside a finished checkpoint."""

    checkpoint: Checkpoint
    plan: Plan | None
    calibration: Calibration | None
    manifest: Manifest | None
    source: Snapshot | None
    """The files of the source; None where `quantize` was called as a library."""
    unreadable: tuple[str, ...]
    """Files that are not the record they should be, with the reason."""


R = TypeVar("R", bound=Record)


def read_records(place: Place) -> EngineRecords | None:
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
    manifest, source = load(Manifest, "manifest.json"), load(Snapshot, "source.json")
    return EngineRecords(checkpoint, plan, calibration, manifest, source, tuple(unreadable))


def _parsed(kind: type[R], data: bytes) -> tuple[R | None, str]:
    """The record and "", or None and why it cannot be read.

    Parts are checked one by one, up to the first mistake, before the whole: pydantic keeps a kilobyte for each mistake,
    and finds eight in the three bytes of `{},`.
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
    """(place, type, content) of each part that can be checked alone: an entry of a long field, or another field."""
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
