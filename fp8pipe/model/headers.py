"""The safetensors files of a checkpoint: the only room that knows their layout.

In: a Snapshot. Out: `Headers`, every tensor with dtype, shape and place, checked so strictly that nothing behind it
has to be afraid of a header; `SourceFiles` and `OutputShard` to read and write bytes at those places; the index.

A file is 8 bytes (little-endian length of the header), the header (JSON, padded with spaces), the data. Offsets in the
header count from the start of the data; `TensorInfo.begin` and `.end` count from the start of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fp8pipe.errors import MalformedCheckpoint

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes per element of every dtype that may stand in a header."""
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself."""
_MAX_DIMS = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor and where its bytes lie."""

    name: str
    dtype: str
    """As in the header: BF16, F16, F32, F8_E4M3, ..."""
    shape: tuple[int, ...]
    shard: str
    begin: int
    """Byte offset from the start of the file."""
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What the header of one file says, checked against the file's size."""

    name: str
    size: int
    data_begin: int
    tensors: tuple[TensorInfo, ...]
    """In the order of their bytes."""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Headers:
    """All headers of a model. No tensor appears twice."""

    shards: tuple[ShardHeader, ...]
    tensors: Mapping[str, TensorInfo]
    """By name, in the order of shards and bytes."""

    @property
    def nbytes(self) -> int:
        """Size of the safetensors files."""
        return sum(shard.size for shard in self.shards)


def read_folder_headers(folder: Path) -> Headers:
    """Headers of every safetensors file at the top of `folder`, without consulting an index."""
    shards = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER))
        shards.append(parse_header(path.name, path.stat().st_size, head))
    return Headers(tuple(shards), _all_tensors(shards))


def header_length(name: str, size: int, head: bytes) -> int:
    """Length of the JSON header, from the first 8 bytes, checked against the file's size."""
    if len(head) < 8:
        raise MalformedCheckpoint(f"{name}: {size} bytes are too few for a safetensors file; fetch it again")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER or 8 + length > size:
        limit = min(MAX_HEADER, size - 8)
        raise MalformedCheckpoint(f"{name}: its header claims {length} bytes, at most {limit} are possible")
    return length


def parse_header(name: str, size: int, head: bytes) -> ShardHeader:
    """Read the header of file `name` of `size` bytes from `head`, its first bytes (at least through the header)."""
    length = header_length(name, size, head)
    if len(head) < 8 + length:
        raise MalformedCheckpoint(f"{name}: the file ends inside its header of {length} bytes; fetch it again")
    entries = _parse_json(name, head[8 : 8 + length])
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedCheckpoint(f"{name}: __metadata__ must map strings to strings")
    begin = 8 + length
    tensors = sorted((_tensor(name, begin, key, entry) for key, entry in entries.items()), key=_place)
    _check_contiguous(name, begin, size, tensors)
    return ShardHeader(name, size, begin, tuple(tensors), metadata)


def _place(info: TensorInfo) -> tuple[int, int]:
    return info.begin, info.end


def _parse_json(name: str, text: bytes) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise MalformedCheckpoint(f"{name}: {twice!r} stands twice in the header")
        return entries

    try:
        entries = json.loads(text, object_pairs_hook=without_duplicates)
    except MalformedCheckpoint:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedCheckpoint(f"{name}: its header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise MalformedCheckpoint(f"{name}: its header is a {type(entries).__name__}, expected an object")
    return entries


def _tensor(shard: str, data_begin: int, name: str, entry: Any) -> TensorInfo:
    where = f"{shard}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MalformedCheckpoint(f"{where}: expected dtype, shape and data_offsets, found {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise MalformedCheckpoint(f"{where}: unknown dtype {_short(dtype)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise MalformedCheckpoint(f"{where}: shape {_short(shape)} is not a list of at most {_MAX_DIMS} sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedCheckpoint(f"{where}: data_offsets {_short(offsets)} are not [begin, end]")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        found = offsets[1] - offsets[0]
        raise MalformedCheckpoint(f"{where}: {dtype} {_short(shape)} takes {expected} bytes, its offsets span {found}")
    return TensorInfo(name, dtype, tuple(shape), shard, data_begin + offsets[0], data_begin + offsets[1])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_contiguous(name: str, begin: int, size: int, tensors: Sequence[TensorInfo]) -> None:
    position = begin
    for info in tensors:
        if info.begin != position:
            kind = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            raise MalformedCheckpoint(
                f"{name}: {info.name} begins at byte {info.begin}, expected {position}: it {kind}"
            )
        position = info.end
    if position != size:
        fault = "is cut off; fetch it again" if position > size else "has bytes that no tensor owns"
        raise MalformedCheckpoint(f"{name}: tensors end at byte {position}, the file has {size}: it {fault}")


def _all_tensors(shards: Iterable[ShardHeader]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for info in shard.tensors:
            if info.name in tensors:
                other = tensors[info.name].shard
                raise MalformedCheckpoint(f"{info.name} is in {other} and in {shard.name}: which one counts is unknown")
            tensors[info.name] = info
    return tensors


def check_index(content: bytes, headers: Headers) -> None:
    """Compare `model.safetensors.index.json` with the headers: same tensors, same files, no path that leaves the
    folder."""
    index = _parse_json(INDEX_NAME, content)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise MalformedCheckpoint(f"{INDEX_NAME}: weight_map must map tensor names to file names")
    for shard in set(weight_map.values()):
        _check_file_name(shard, INDEX_NAME)
    for name, shard in weight_map.items():
        info = headers.tensors.get(name)
        if info is None or info.shard != shard:
            found = "no file holds it" if info is None else f"it is in {info.shard}"
            raise MalformedCheckpoint(f"{INDEX_NAME}: {name} should be in {shard}, {found}")
    unlisted = next((name for name in headers.tensors if name not in weight_map), None)
    if unlisted is not None:
        shard = headers.tensors[unlisted].shard
        raise MalformedCheckpoint(f"{INDEX_NAME}: {unlisted} is in {shard} but not in the index")


def _check_file_name(name: str, where: str) -> None:
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or "\0" in name
        or not path.name.endswith(".safetensors")
    ):
        raise MalformedCheckpoint(f"{where}: {name!r} is no safetensors file inside the model's folder")


# ---------------------------------------------------------------------------------------------- laying out


def lay_out(shard: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorInfo, ...]:
    """Places of `tensors` (name, dtype, shape) in the file `shard`, in the order given after sorting by item size.

    Wide items first keep every tensor aligned to its item size, as readers that map files expect.
    """
    ordered = sorted(tensors, key=lambda item: -ITEM_BYTES[item[1]])
    relative = []
    position = 0
    for name, dtype, shape in ordered:
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        relative.append(TensorInfo(name, dtype, shape, shard, position, end))
        position = end
    begin = len(header_bytes(relative, 0))
    return tuple(
        TensorInfo(info.name, info.dtype, info.shape, shard, begin + info.begin, begin + info.end) for info in relative
    )


def header_bytes(tensors: Iterable[TensorInfo], data_begin: int) -> bytes:
    """Length field and header for `tensors`, whose offsets count from `data_begin`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for info in tensors:
        offsets = [info.begin - data_begin, info.end - data_begin]
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_bytes(tensors: Iterable[TensorInfo]) -> bytes:
    """Content of `model.safetensors.index.json`."""
    placed = tuple(tensors)
    weight_map = {info.name: info.shard for info in placed}
    total = sum(info.nbytes for info in placed)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"
