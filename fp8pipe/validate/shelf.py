"""The tensors of a checkpoint as far as its headers can be read, and every fault met on the way.

In: a `Place`. Out: a `Shelf`. Loading stops at the first fault; validation must go on and report them all, so nothing
in here raises on bad content.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fp8pipe.model.headers import (
    INDEX_NAME,
    MAX_TENSORS,
    HeaderFault,
    Kind,
    TensorInfo,
    compare_index,
    header_end,
    read_header,
    read_index,
    stored_twice,
)
from fp8pipe.model.untrusted import MAX_JSON_BYTES, clip, parse_json, too_long
from fp8pipe.validate.findings import MAX_FINDINGS_PER_CHECK, Fault
from fp8pipe.validate.place import Place

INDEX = INDEX_NAME

MISTRAL = re.compile(r"^(consolidated.*\.safetensors|params\.json)$")
_SHARD_OF = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")

FIRST_READ = 1 << 18
"""Bytes to ask for before a header's length is known: one request for most headers of the Hub."""

HEADERS_AT_ONCE = 8
"""Requests under way when headers come from the Hub."""


@dataclass
class Shelf:
    """A checkpoint as far as its headers can be read."""

    place: Place
    index: dict[str, str] | None = None
    """weight_map; None when there is no index, or none that can be used."""
    total_size: object = None
    """metadata.total_size of the index, whatever it is."""
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    """Tensors that the index places in a file that is missing or unreadable."""
    blind: bool = False
    """Files are unreadable or missing and no index says what was in them: absence proves nothing."""
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    """By check id."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return self.place.sizes

    def has(self, name: str) -> bool:
        """Whether the tensor is there, or is not to be missed because a fault of its file is already known."""
        return name in self.tensors or name in self.lost or self.blind

    def fault(self, check_id: str, expected: str, found: str, **more: Any) -> None:
        """Note a fault of the check; more than can be told are not kept."""
        if len(self.faults[check_id]) <= MAX_FINDINGS_PER_CHECK:
            self.faults[check_id].append(Fault(expected, found, **more))

    def take(self, faults: Iterable[HeaderFault]) -> None:
        """Note faults of headers and index."""
        for fault in faults:
            self.fault(CHECK_OF[fault.kind], fault.expected, fault.found, file=fault.file, tensor=fault.tensor)

    def json(self, name: str) -> tuple[Any, str | None]:
        """The value of a JSON file and None, or None and why it cannot be read."""
        size = self.sizes[name]
        if size > MAX_JSON_BYTES:
            return None, too_long(size)
        return parse_json(self.place.read(name, 0, size))

    def shards(self) -> list[str]:
        """Names of the files that hold the tensors found."""
        return sorted({entry.shard for entry in self.tensors.values()})


def open_shelf(place: Place) -> Shelf:
    """Read names, sizes, index and headers. Cost: the headers."""
    shelf = Shelf(place)
    shards = [name for name in place.sizes if _is_shard(name)]
    weight_map = _read_index(shelf)
    unusable = {name for name in shards if _is_unusable(shelf, name)}
    _compare_index_with_files(shelf, weight_map, shards)
    shelf.index = weight_map
    wanted = shards if weight_map is None else sorted(set(weight_map.values()) & set(shards))
    for name, head in _heads(place, [name for name in wanted if name not in unusable]):
        _take_shard(shelf, name, head)
    for name in unusable & set(wanted):
        _lose_shard(shelf, name)
    _compare_index_with_headers(shelf)
    return shelf


def _is_shard(name: str) -> bool:
    """Files that vLLM's loader globs as weights: at the top of the folder, neither Mistral's own nor an adapter."""
    in_top = "/" not in name and name.endswith(".safetensors") and not name.startswith(".")
    return in_top and not MISTRAL.match(name) and name != "adapter_model.safetensors"


def _is_unusable(shelf: Shelf, name: str) -> bool:
    """F9: what is no weight file at all is not parsed: one fault is enough for it."""
    reason = shelf.place.trouble(name)
    if reason:
        shelf.fault("F9", "the weights themselves", clip(reason), file=name)
    return reason is not None


# ---------------------------------------------------------------------------------------------- index


CHECK_OF: dict[Kind, str] = {"header": "F1", "index": "F2", "row": "F3", "name": "F9"}


def _read_index(shelf: Shelf) -> dict[str, str] | None:
    """weight_map with its shape proven, or None; faults go to F2, F3 and F9."""
    if INDEX not in shelf.sizes:
        return None
    size = shelf.sizes[INDEX]
    if size > MAX_JSON_BYTES:
        shelf.fault("F2", "a JSON object with weight_map", too_long(size), file=INDEX)
        return None
    index = read_index(shelf.place.read(INDEX, 0, size))
    shelf.take(index.faults)
    shelf.lost.update(index.lost)
    shelf.total_size = index.total_size
    return index.weight_map


def _compare_index_with_files(shelf: Shelf, weight_map: dict[str, str] | None, shards: list[str]) -> None:
    if weight_map is None:
        _compare_names_with_count(shelf, shards)
        return
    tensors_of: dict[str, set[str]] = defaultdict(set)
    for name, file in weight_map.items():
        tensors_of[file].add(name)
    for file in sorted(tensors_of.keys() - set(shards)):
        shelf.lost |= tensors_of[file]
        shelf.fault("F2", f"the file of {len(tensors_of[file])} tensors of the index", "no such file", file=file)
    for file in sorted(set(shards) - tensors_of.keys()):
        shelf.fault("F6", "a file that the index names", "no tensor of the index lies in it", file=file)


def _compare_names_with_count(shelf: Shelf, shards: list[str]) -> None:
    """Without an index every file is loaded, in any order; names tell how many there should be."""
    if not shards:
        shelf.blind = True
        shelf.fault("F2", "at least one *.safetensors file", "none")
        return
    if len(shards) > 1:
        shelf.fault("F2", f"{INDEX} for {len(shards)} weight files", "no usable index", file=INDEX)
    totals = {int(match[2]) for match in map(_SHARD_OF.search, shards) if match}
    if totals and len(shards) < max(totals):
        shelf.blind = True
        shelf.fault("F2", f"{max(totals)} shards, as their names say", f"{len(shards)}", file=shards[0])


def _compare_index_with_headers(shelf: Shelf) -> None:
    if shelf.index is not None:
        shelf.take(compare_index(shelf.index, shelf.tensors, lost=shelf.lost))
        # what coverage misses is that row's fault, said once
        shelf.lost |= shelf.index.keys() - shelf.tensors.keys()


# ---------------------------------------------------------------------------------------------- headers


def _heads(place: Place, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """(file, its first bytes through the header), in order; many requests at once when they go to the Hub."""
    if place.root is not None:
        yield from ((name, _head(place, name)) for name in names)
        return
    with ThreadPoolExecutor(HEADERS_AT_ONCE, "headers") as pool:
        for start in range(0, len(names), HEADERS_AT_ONCE):  # a batch at a time bounds what is held
            batch = names[start : start + HEADERS_AT_ONCE]
            yield from zip(batch, pool.map(lambda name: _head(place, name), batch), strict=True)


def _head(place: Place, name: str) -> bytes:
    """What the file says is its header, or what there is of it; a length beyond all bounds is not fetched."""
    size = place.sizes[name]
    head = place.read(name, 0, min(size, FIRST_READ))
    if (end := header_end(size, head)) > len(head):
        head += place.read(name, len(head), end)
    return head


def _take_shard(shelf: Shelf, name: str, head: bytes) -> None:
    header = read_header(name, shelf.sizes[name], head, max_tensors=MAX_TENSORS - len(shelf.tensors))
    shelf.take(header.faults)
    if not header.is_readable:
        _lose_shard(shelf, name)
        return
    shelf.lost.update(header.lost)
    if header.metadata is not None and header.metadata.get("format") != "pt":
        shelf.fault("F8", 'metadata "format": "pt"', clip(repr(header.metadata.get("format"))), file=name)
    for entry in header.tensors:
        if entry.name in shelf.tensors:
            twice = stored_twice(entry, shelf.tensors[entry.name].shard)
            shelf.fault("F4", twice.expected, twice.found, file=name, tensor=entry.name)
        if entry.name not in shelf.tensors or (shelf.index or {}).get(entry.name) == name:
            shelf.tensors[entry.name] = entry


def _lose_shard(shelf: Shelf, name: str) -> None:
    """What was in the file is not to be missed again by other checks."""
    if shelf.index is None and INDEX not in shelf.sizes:
        shelf.blind = True
    shelf.lost |= {tensor for tensor, file in (shelf.index or {}).items() if file == name}
