"""Headers and index of a checkpoint's safetensors files: the only module that knows their layout.

In: a Snapshot. Out: `Headers`, every tensor with dtype, shape and place, checked so strictly that later code can trust
them; the index. `shards.py` reads and writes the bytes at those places.

A file is 8 bytes (little-endian length of the header), the header (JSON, padded with spaces), the data. Offsets in the
header count from the start of the data; `TensorInfo.begin` and `.end` count from the start of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fp8pipe.errors import MalformedCheckpoint
from fp8pipe.model.untrusted import MAX_NAME, clip, is_plain, parse_json

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
MAX_TENSORS = 2_000_000
"""More than any model has, over all files; each costs half a kilobyte of memory."""
MAX_SHARDS = 10_000
"""More files than any model has."""
MAX_FAULTS = 10_000
"""Of one file. More are not kept: a header may hold millions."""
_A_NAME = f"a name of at most {MAX_NAME} printable characters"
_MAX_DIMS = 16
"""More dimensions than any tensor of a model has."""


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


# ---------------------------------------------------------------------------------------------- what is read


Kind = Literal["header", "index", "row", "name"]
"""Of a fault: in a header; no index at all; an index that disagrees with the headers; a name that leaves the folder."""


@dataclass(frozen=True, slots=True)
class HeaderFault:
    """One thing that is wrong with a header or an index."""

    file: str
    expected: str
    found: str
    tensor: str | None = None
    kind: Kind = "header"

    def error(self) -> MalformedCheckpoint:
        """The same, for callers that cannot use a file with any fault."""
        where = self.file if self.tensor is None else f"{self.file}: {clip(self.tensor)}"
        return MalformedCheckpoint(
            f"{where}: expected {self.expected}, found {self.found}; download or write the file again"
        )


@dataclass(slots=True)
class HeaderReading:
    """What could be read of one file's header, and everything that is wrong with it."""

    file: str
    size: int
    data_begin: int = 0
    tensors: list[TensorInfo] = field(default_factory=list)
    """Those whose bytes are in the file, in the order of the header."""
    lost: list[str] = field(default_factory=list)
    """Names in the header that are not among `tensors`."""
    metadata: Mapping[str, str] | None = None
    """None if there is none that can be used."""
    faults: list[HeaderFault] = field(default_factory=list)
    is_readable: bool = False
    """The header is a JSON object: what it does not name is not in the file."""

    def fault(self, expected: str, found: str, tensor: str | None = None) -> None:
        """Note one."""
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(HeaderFault(self.file, expected, found, tensor))


def read_folder_headers(folder: Path) -> Headers:
    """Headers of every safetensors file at the top of `folder`, without consulting an index."""
    shards = []
    for path in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        with path.open("rb") as file:
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER))
        shards.append(parse_header(path.name, path.stat().st_size, head))
    return join_headers(shards)


def join_headers(shards: Iterable[ShardHeader]) -> Headers:
    """All of them together; raises MalformedCheckpoint if a tensor is in two files, or there are too many."""
    tensors: dict[str, TensorInfo] = {}
    taken: list[ShardHeader] = []
    for shard in shards:
        taken.append(shard)
        if len(tensors) + len(shard.tensors) > MAX_TENSORS:
            raise HeaderFault(shard.name, f"at most {MAX_TENSORS} tensors in all files", "more").error()
        for info in shard.tensors:
            if info.name in tensors:
                raise stored_twice(info, tensors[info.name].shard).error()
            tensors[info.name] = info
    return Headers(tuple(taken), tensors)


def stored_twice(info: TensorInfo, other: str) -> HeaderFault:
    """The fault of a tensor that is also in file `other`."""
    return HeaderFault(info.shard, "each tensor in one file", f"also in {other}", info.name)


def header_end(size: int, head: bytes) -> int:
    """Where the header of a file of `size` bytes ends, from its first 8 bytes; 0 if that is impossible."""
    end = 8 + int.from_bytes(head[:8], "little")
    return end if len(head) >= 8 and end <= min(size, 8 + MAX_HEADER) else 0


def parse_header(name: str, size: int, head: bytes) -> ShardHeader:
    """The header of file `name` of `size` bytes from `head`, its first bytes (at least through the header).

    Raises MalformedCheckpoint with the first thing that is wrong with it."""
    reading = read_header(name, size, head)
    if reading.faults:
        raise reading.faults[0].error()
    tensors = tuple(sorted(reading.tensors, key=_place))
    return ShardHeader(name, size, reading.data_begin, tensors, reading.metadata or {})


def read_header(name: str, size: int, head: bytes, *, max_tensors: int = MAX_TENSORS) -> HeaderReading:
    """What `parse_header` does, for callers that want every fault: nothing is raised."""
    reading = HeaderReading(name, size)
    end = header_end(size, head)
    if not end or len(head) < end:
        reading.fault(f"a header within the file's {size} bytes", f"a header length of {_length(head)}")
        return reading
    header, problem = parse_json(head[8:end])
    if problem is None and isinstance(header, dict) and len(header) > max_tensors:
        header, problem = None, f"more than {MAX_TENSORS} tensors in all files"
    if problem or not isinstance(header, dict):
        reading.fault("a JSON object as header", problem or type(header).__name__)
    if not isinstance(header, dict):
        return reading
    reading.is_readable, reading.data_begin = True, end
    reading.metadata = _metadata(reading, header.pop("__metadata__", None))
    found = [info for key, row in header.items() if (info := _tensor(reading, key, row))]
    _prove_contiguous(reading, found, complete=len(found) == len(header))
    reading.tensors = [info for info in found if info.end <= size]
    reading.lost += [info.name for info in found if info.end > size]
    return reading


def _length(head: bytes) -> int:
    return int.from_bytes(head[:8], "little")


def _metadata(reading: HeaderReading, value: Any) -> Mapping[str, str] | None:
    """`__metadata__`; null stands for none, as in the safetensors library."""
    if value is not None and not (isinstance(value, dict) and all(isinstance(text, str) for text in value.values())):
        reading.fault("__metadata__ of strings", clip(repr(value)))
        return None
    return value or {}


def _tensor(reading: HeaderReading, name: str, row: Any) -> TensorInfo | None:
    """One row of a header; None, and a fault, if it makes no sense."""

    def wrong(expected: str, found: object) -> None:
        reading.lost.append(name)
        reading.fault(expected, clip(found), name)

    if not is_plain(name):
        return wrong(_A_NAME, repr(name))
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
    begin, end = (reading.data_begin + offset for offset in offsets)
    return TensorInfo(name, dtype, tuple(shape), reading.file, begin, end)


def _are_sizes(value: Any) -> bool:
    is_short = isinstance(value, list) and len(value) <= _MAX_DIMS
    return is_short and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _prove_contiguous(reading: HeaderReading, tensors: Sequence[TensorInfo], *, complete: bool) -> None:
    """Each tensor begins where the last one ends, and the last one ends with the file.

    `complete`: every row of the header made sense; otherwise the others' bytes may lie in a gap."""
    at = reading.data_begin
    for info in sorted(tensors, key=_place):
        overlap = info.begin < at
        if overlap or (complete and info.begin > at):
            where = "inside" if overlap else "after a gap behind"
            found = f"byte {info.begin - reading.data_begin}, {where} another tensor"
            reading.fault(f"data at byte {at - reading.data_begin}", found, info.name)
        at = max(at, info.end)
    if at > reading.size or (complete and at < reading.size):
        reading.fault(f"a file of {at} bytes, as its header says", f"{reading.size} bytes")


def _place(info: TensorInfo) -> tuple[int, int]:
    return info.begin, info.end


# ---------------------------------------------------------------------------------------------- the index


@dataclass(slots=True)
class IndexReading:
    """What could be read of `model.safetensors.index.json`, and everything that is wrong with it."""

    weight_map: dict[str, str] | None = None
    """Tensor -> file, of the rows that make sense; None if there is no weight_map."""
    total_size: object = None
    """metadata.total_size as it stands there."""
    lost: list[str] = field(default_factory=list)
    """Tensors whose row makes no sense."""
    faults: list[HeaderFault] = field(default_factory=list)

    def fault(self, kind: Kind, expected: str, found: str, tensor: str | None = None) -> None:
        """Note one."""
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(HeaderFault(INDEX_NAME, expected, found, tensor, kind))


def read_index(content: bytes) -> IndexReading:
    """Every row of the index that names a weight file, and the faults of the others: nothing is raised."""
    reading = IndexReading()
    value, problem = parse_json(content)
    if problem:
        reading.fault("index", "a JSON object with weight_map", problem)
    rows = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(rows, dict) or not rows:
        if not problem:
            reading.fault("index", "a weight_map of tensor names to files", type(rows).__name__)
        return reading
    metadata = value.get("metadata")
    reading.total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    weight_map = {name: file for name, file in rows.items() if _names_a_file(reading, name, file)}
    if (count := len(set(weight_map.values()))) > MAX_SHARDS:
        reading.fault("index", f"at most {MAX_SHARDS} files", f"{count}")
    else:
        reading.weight_map = weight_map
    return reading


def _names_a_file(reading: IndexReading, tensor: str, file: Any) -> bool:
    if not isinstance(file, str) or not file:
        reading.fault("row", "a file name", clip(repr(file)), tensor)
    elif not is_plain_name(file):
        reading.fault("name", "a file name without folders", clip(repr(file)), tensor)
    elif not (is_plain(tensor) and is_plain(file)):
        reading.fault("name", _A_NAME, clip(repr(tensor if is_plain(file) else file)), tensor)
    else:
        return True
    reading.lost.append(tensor)
    return False


def is_plain_name(name: str) -> bool:
    """Whether a name from an index stays in the index's folder, on any system."""
    return name not in {"", ".", ".."} and not any(mark in name for mark in ("/", "\\", ":", "\0"))


def compare_index(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], *, lost: Collection[str] = ()
) -> Iterator[HeaderFault]:
    """Where the index and the headers disagree about which file holds a tensor.

    `lost`: tensors that are known to be missing, with their files."""
    for name, file in weight_map.items():
        info = tensors.get(name)
        if info is None and name not in lost:
            yield HeaderFault(file, "the tensor in the file that the index names", "not in it", name, "row")
        elif info is not None and info.shard != file:
            yield HeaderFault(INDEX_NAME, f"in {info.shard}, where the tensor is", f"in {file}", name, "row")
    for name, info in tensors.items():
        if name not in weight_map:
            yield HeaderFault(info.shard, "listed in the index", "absent from it", name, "row")


def require_index(content: bytes, headers: Headers) -> None:
    """Raise MalformedCheckpoint unless the index maps exactly the tensors of `headers`, each to its file."""
    reading = read_index(content)
    for fault in (*reading.faults, *compare_index(reading.weight_map or {}, headers.tensors)):
        raise fault.error()


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
