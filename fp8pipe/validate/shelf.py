"""The tensors of a checkpoint as far as its headers can be read, and every fault met on the way.

In: a `Place`. Out: a `Shelf`. Loading stops at the first fault; validation must go on and report them all, so nothing
in here raises on bad content.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from fp8pipe.model.headers import INDEX_NAME, ITEM_BYTES, MAX_HEADER, TensorInfo
from fp8pipe.model.untrusted import MAX_JSON_BYTES, clip, parse_json
from fp8pipe.validate.findings import MAX_FINDINGS_PER_CHECK, Fault
from fp8pipe.validate.place import Place

INDEX = INDEX_NAME

MAX_TENSORS = 2_000_000
"""More than any model has, over all files; each costs half a kilobyte of memory."""

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

    def json(self, name: str) -> tuple[Any, str | None]:
        """The value of a JSON file and None, or None and why it cannot be read."""
        size = self.sizes[name]
        if size > MAX_JSON_BYTES:
            return None, f"{size} bytes, more than any real file of this kind"
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


def _read_index(shelf: Shelf) -> dict[str, str] | None:
    """weight_map with its shape proven, or None; faults go to F2, F3 and F9."""
    if INDEX not in shelf.sizes:
        return None
    content, problem = shelf.json(INDEX)
    if problem:
        shelf.fault("F2", "a JSON object with weight_map", problem, file=INDEX)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        if not problem:
            shelf.fault("F2", "a weight_map of tensor names to files", clip(type(weight_map).__name__), file=INDEX)
        return None
    metadata = content.get("metadata")
    shelf.total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return dict(_sound_rows(shelf, weight_map))


def _sound_rows(shelf: Shelf, weight_map: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            shelf.fault("F3", "a file name", clip(repr(file)), file=INDEX, tensor=name)
        elif PurePosixPath(file).name != file or file in {".", ".."} or "\\" in file or "\0" in file:
            shelf.fault("F9", "a file name without folders", clip(repr(file)), file=INDEX, tensor=name)
        else:
            yield name, file
            continue
        shelf.lost.add(name)


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
    if shelf.index is None:
        return
    for name, file in shelf.index.items():
        entry = shelf.tensors.get(name)
        if entry is None and name not in shelf.lost:
            # what coverage misses is this row's fault, said once
            shelf.fault("F3", "the tensor in the file that the index names", "not in it", file=file, tensor=name)
            shelf.lost.add(name)
        elif entry is not None and entry.shard != file:
            shelf.fault("F3", f"in {entry.shard}, where the tensor is", f"in {file}", file=INDEX, tensor=name)
    for name in shelf.tensors.keys() - shelf.index.keys():
        shelf.fault("F3", "listed in the index", "absent from it", file=shelf.tensors[name].shard, tensor=name)


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
    end = 8 + int.from_bytes(head[:8], "little")
    if len(head) < end <= min(size, 8 + MAX_HEADER):
        head += place.read(name, len(head), end)
    return head


def _take_shard(shelf: Shelf, name: str, head: bytes) -> None:
    entries = _read_header(shelf, name, head)
    if entries is None:
        _lose_shard(shelf, name)
        return
    for entry in entries:
        if entry.name in shelf.tensors:
            first = shelf.tensors[entry.name].shard
            shelf.fault("F4", "each tensor in one file", f"also in {first}", file=name, tensor=entry.name)
        if entry.name not in shelf.tensors or (shelf.index or {}).get(entry.name) == name:
            shelf.tensors[entry.name] = entry


def _lose_shard(shelf: Shelf, name: str) -> None:
    """What was in the file is not to be missed again by other checks."""
    if shelf.index is None and INDEX not in shelf.sizes:
        shelf.blind = True
    shelf.lost |= {tensor for tensor, file in (shelf.index or {}).items() if file == name}


def _read_header(shelf: Shelf, name: str, head: bytes) -> list[TensorInfo] | None:
    """The entries that make sense, or None when the header as a whole does not."""
    size, length = shelf.sizes[name], int.from_bytes(head[:8], "little")
    if size < 8 or len(head) < 8 + length:
        shelf.fault("F1", f"a header within the file's {size} bytes", f"a header length of {length}", file=name)
        return None
    header, problem = parse_json(head[8 : 8 + length])
    if problem is None and isinstance(header, dict) and len(shelf.tensors) + len(header) > MAX_TENSORS:
        header, problem = None, f"more than {MAX_TENSORS} tensors"
    if problem or not isinstance(header, dict):
        shelf.fault("F1", "a JSON object as header", problem or type(header).__name__, file=name)
    if not isinstance(header, dict):
        return None
    _check_metadata(shelf, name, header.pop("__metadata__", None))
    entries = [entry for key, value in header.items() if (entry := _entry(shelf, name, key, value, 8 + length))]
    _prove_contiguous(shelf, name, entries, 8 + length, size, complete=len(entries) == len(header))
    shelf.lost |= {entry.name for entry in entries if entry.end > size}
    return [entry for entry in entries if entry.end <= size]


def _check_metadata(shelf: Shelf, name: str, metadata: Any) -> None:
    is_text_map = isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    if metadata is not None and not is_text_map:
        shelf.fault("F1", "__metadata__ of strings", clip(repr(metadata)), file=name)
    elif (metadata or {}).get("format") != "pt":
        shelf.fault("F8", 'metadata "format": "pt"', clip(repr((metadata or {}).get("format"))), file=name)


def _entry(shelf: Shelf, file: str, name: str, row: Any, data_begin: int) -> TensorInfo | None:
    """One row of a header, or None with an F1 fault."""

    def wrong(expected: str, found: object) -> None:
        shelf.lost.add(name)
        shelf.fault("F1", expected, clip(found), file=file, tensor=name)

    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        return wrong("dtype, shape and data_offsets", sorted(row) if isinstance(row, dict) else type(row).__name__)
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return wrong("a dtype of safetensors in whole bytes", repr(dtype))
    if not _are_sizes(shape):
        return wrong("a shape of whole numbers", repr(shape))
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return wrong("data_offsets [begin, end]", repr(offsets))
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        return wrong(f"{nbytes} bytes for {dtype} {shape}", f"{offsets[1] - offsets[0]} bytes")
    return TensorInfo(name, dtype, tuple(shape), file, data_begin + offsets[0], data_begin + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _prove_contiguous(
    shelf: Shelf, file: str, entries: list[TensorInfo], begin: int, size: int, *, complete: bool
) -> None:
    """Each tensor begins where the last ended and the last ends with the file. Rows already at fault excuse gaps."""
    at = begin
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        overlap = entry.begin < at
        if overlap or (complete and entry.begin > at):
            found = f"byte {entry.begin - begin}, {'inside' if overlap else 'after a gap behind'} another tensor"
            shelf.fault("F1", f"data at byte {at - begin}", found, file=file, tensor=entry.name)
        at = max(at, entry.end)
    if at > size or (complete and at < size):
        shelf.fault("F1", f"a file of {at} bytes, as its header says", f"{size} bytes", file=file)
