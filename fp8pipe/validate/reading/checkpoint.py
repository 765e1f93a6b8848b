"""The files and tensors of a checkpoint, as far as its headers can be read, and every fault met on the way.

The engine stops at the first fault of a header; validation must report them all, so bad content raises nothing here.
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
from fp8pipe.model.untrusted import MAX_JSON_BYTES, clip, parse_config, too_long
from fp8pipe.validate.faults import MAX_FINDINGS_PER_CHECK, Fault
from fp8pipe.validate.reading.place import Place

MISTRAL = re.compile(r"^(consolidated.*\.safetensors|params\.json)$")
"""Files of Mistral's own layout."""
_SHARD_OF = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_CHECK_OF: dict[Kind, str] = {"header": "F1", "index": "F2", "row": "F3", "name": "F9"}
_FIRST_READ = 1 << 18
"""Bytes to ask for before a header's length is known: one request for most headers of the Hub."""
_HEADERS_AT_ONCE = 8
"""Requests under way when headers come from the Hub."""


@dataclass
class CheckpointFiles:
    """Files and tensors of a checkpoint."""

    place: Place
    index: dict[str, str] | None = None
    """weight_map; None when there is no index, or none that can be used."""
    total_size: object = None
    """metadata.total_size of the index, of whatever type."""
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    """Tensors whose file or header row has a fault: that they are missing is not a fault of its own."""
    blind: bool = False
    """Files are unreadable or missing and no index says what was in them: absence proves nothing."""
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    """By check id."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return self.place.sizes

    def may_have(self, name: str) -> bool:
        """Whether the tensor is present, or may be in a file that cannot be read."""
        return name in self.tensors or name in self.lost or self.blind

    def fault(self, check_id: str, expected: str, found: str, **more: Any) -> None:
        """Note a fault of the check, up to as many as a report has room for."""
        if len(self.faults[check_id]) <= MAX_FINDINGS_PER_CHECK:
            self.faults[check_id].append(Fault(expected, found, **more))

    def take(self, faults: Iterable[HeaderFault]) -> None:
        """Note faults of headers and index."""
        for fault in faults:
            self.fault(_CHECK_OF[fault.kind], fault.expected, fault.found, file=fault.file, tensor=fault.tensor)

    def json_object(self, name: str) -> tuple[dict[str, Any] | None, str | None]:
        """The object in a JSON file, or None; and what is wrong with the file, or None."""
        if name not in self.sizes:
            return None, f"no {name}"
        size = self.sizes[name]
        if size > MAX_JSON_BYTES:
            return None, too_long(size)
        return parse_config(self.place.read(name, 0, size))

    def shards(self) -> list[str]:
        """Names of the files that hold the tensors found."""
        return sorted({entry.shard for entry in self.tensors.values()})


def open_checkpoint(place: Place) -> CheckpointFiles:
    """Read names, sizes, index and headers of `place`."""
    files = CheckpointFiles(place)
    shards = [name for name in place.sizes if _is_shard(name)]
    _read_index(files)
    unusable = {name for name in shards if _is_unusable(files, name)}
    if files.index is None:
        _compare_names_with_count(files, shards)
    else:
        _compare_index_with_files(files, files.index, shards)
    wanted = shards if files.index is None else sorted(set(files.index.values()) & set(shards))
    for name, head in _heads(place, [name for name in wanted if name not in unusable]):
        _take_shard(files, name, head)
    for name in unusable & set(wanted):
        _lose_shard(files, name)
    if files.index is not None:
        files.take(compare_index(files.index, files.tensors, lost=files.lost))
        files.lost |= files.index.keys() - files.tensors.keys()
    return files


def _is_shard(name: str) -> bool:
    """Files that vLLM's loader globs as weights: at the top of the folder, neither Mistral's own nor an adapter."""
    in_top = "/" not in name and name.endswith(".safetensors") and not name.startswith(".")
    return in_top and not MISTRAL.match(name) and name != "adapter_model.safetensors"


def _is_unusable(files: CheckpointFiles, name: str) -> bool:
    """Whether the file cannot hold weights, which is noted as a fault; its header is then not parsed."""
    reason = files.place.trouble(name)
    if reason:
        files.fault("F9", "the weights themselves", clip(reason), file=name)
    return reason is not None


# ---------------------------------------------------------------------------------------------- index


def _read_index(files: CheckpointFiles) -> None:
    if INDEX_NAME not in files.sizes:
        return
    size = files.sizes[INDEX_NAME]
    if size > MAX_JSON_BYTES:
        files.fault("F2", "a JSON object with weight_map", too_long(size), file=INDEX_NAME)
        return
    index = read_index(files.place.read(INDEX_NAME, 0, size))
    files.take(index.faults)
    files.lost.update(index.lost)
    files.index, files.total_size = index.weight_map, index.total_size


def _compare_index_with_files(files: CheckpointFiles, weight_map: dict[str, str], shards: list[str]) -> None:
    tensors_of: dict[str, set[str]] = defaultdict(set)
    for name, file in weight_map.items():
        tensors_of[file].add(name)
    for file in sorted(tensors_of.keys() - set(shards)):
        files.lost |= tensors_of[file]
        files.fault("F2", f"the file of {len(tensors_of[file])} tensors of the index", "no such file", file=file)
    for file in sorted(set(shards) - tensors_of.keys()):
        files.fault("F6", "a file that the index names", "no tensor of the index lies in it", file=file)


def _compare_names_with_count(files: CheckpointFiles, shards: list[str]) -> None:
    """Without an index every file is loaded, in any order; the names say how many there should be."""
    if not shards:
        files.blind = True
        files.fault("F2", "at least one *.safetensors file", "none")
        return
    if len(shards) > 1:
        files.fault("F2", f"{INDEX_NAME} for {len(shards)} weight files", "no usable index", file=INDEX_NAME)
    totals = {int(match[2]) for match in map(_SHARD_OF.search, shards) if match}
    if totals and len(shards) < max(totals):
        files.blind = True
        files.fault("F2", f"{max(totals)} shards, as their names say", f"{len(shards)}", file=shards[0])


# ---------------------------------------------------------------------------------------------- headers


def _heads(place: Place, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """(file, its first bytes through the header), in order; from the Hub by several requests at once."""
    if place.root is not None:
        yield from ((name, _head(place, name)) for name in names)
        return
    with ThreadPoolExecutor(_HEADERS_AT_ONCE, "headers") as pool:
        for start in range(0, len(names), _HEADERS_AT_ONCE):  # a batch at a time bounds the memory
            batch = names[start : start + _HEADERS_AT_ONCE]
            yield from zip(batch, pool.map(lambda name: _head(place, name), batch), strict=True)


def _head(place: Place, name: str) -> bytes:
    """The file's bytes through its header, or what there is of them if the header's length is impossible."""
    size = place.sizes[name]
    head = place.read(name, 0, min(size, _FIRST_READ))
    if (end := header_end(size, head)) > len(head):
        head += place.read(name, len(head), end)
    return head


def _take_shard(files: CheckpointFiles, name: str, head: bytes) -> None:
    header = read_header(name, files.sizes[name], head, max_tensors=MAX_TENSORS - len(files.tensors))
    files.take(header.faults)
    if not header.is_readable:
        _lose_shard(files, name)
        return
    files.lost.update(header.lost)
    if header.metadata is not None and header.metadata.get("format") != "pt":
        files.fault("F8", 'metadata "format": "pt"', clip(repr(header.metadata.get("format"))), file=name)
    for entry in header.tensors:
        if entry.name in files.tensors:
            twice = stored_twice(entry, files.tensors[entry.name].shard)
            files.fault("F4", twice.expected, twice.found, file=name, tensor=entry.name)
        if entry.name not in files.tensors or (files.index or {}).get(entry.name) == name:
            files.tensors[entry.name] = entry


def _lose_shard(files: CheckpointFiles, name: str) -> None:
    """Note that the tensors of an unreadable file are lost."""
    if files.index is None and INDEX_NAME not in files.sizes:
        files.blind = True
    files.lost |= {tensor for tensor, file in (files.index or {}).items() if file == name}
