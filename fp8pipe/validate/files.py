"""Files, safetensors headers and index: what lies in the folder, read leniently.

In: a folder. Out: a `Shelf`: every tensor that could be located, and every fault met on the way (checks F1 to F9).
Loading stops at the first fault; validation must go on and report them all, so nothing in here raises on bad content.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fp8pipe.checkpoint import INDEX_NAME, ITEM_BYTES, MAX_HEADER, TensorInfo
from fp8pipe.validate.findings import Fault, check, clip

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

INDEX = INDEX_NAME
MAX_JSON_BYTES = 256_000_000
"""An index of a million tensors is 100 MB."""

MAX_JSON_DEPTH = 64
"""Deeper is no config, and would make Python's own repr fail."""

_LFS = b"version https://git-lfs"
_SHARD_OF = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_MISTRAL = re.compile(r"^(consolidated.*\.safetensors|params\.json)$")


# ---------------------------------------------------------------------------------------------- the shelf


@dataclass
class Shelf:
    """A checkpoint folder as far as it can be read."""

    root: Path
    sizes: dict[str, int] = field(default_factory=dict)
    """Files at the top of the folder and below, by relative name, outside hidden folders."""
    index: dict[str, str] | None = None
    """weight_map; None when there is no index, or none that can be used."""
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    """Tensors that the index places in a file that is missing or unreadable."""
    blind: bool = False
    """Files are unreadable or missing and no index says what was in them: absence proves nothing."""
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    """By check id."""

    def has(self, name: str) -> bool:
        """Whether the tensor is there, or is not to be missed because a fault of its file is already known."""
        return name in self.tensors or name in self.lost or self.blind

    def fault(self, check_id: str, expected: str, found: str, **more: Any) -> None:
        self.faults.setdefault(check_id, []).append(Fault(expected, found, **more))

    def path(self, file: str) -> Path:
        return self.root / file

    def shards(self) -> list[str]:
        """Names of the files that hold the tensors found."""
        return sorted({entry.shard for entry in self.tensors.values()})


def open_shelf(root: Path) -> Shelf:
    """Read names, sizes, index and headers of `root`. Cost: the headers."""
    shelf = Shelf(root, sizes=_list_files(root))
    shards = [name for name in shelf.sizes if _is_shard(name)]
    weight_map = _read_index(shelf)
    _find_unusable(shelf, shards)
    _compare_index_with_files(shelf, weight_map, shards)
    shelf.index = weight_map
    for name in shards if weight_map is None else sorted(set(weight_map.values()) & set(shards)):
        _read_shard(shelf, name)
    _compare_index_with_headers(shelf)
    return shelf


def _list_files(root: Path) -> dict[str, int]:
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            found[path.relative_to(root).as_posix()] = path.stat().st_size if path.exists() else 0
    return found


def _is_shard(name: str) -> bool:
    """Files that vLLM's loader globs as weights: at the top of the folder, neither Mistral's own nor an adapter."""
    in_top = "/" not in name and name.endswith(".safetensors") and not name.startswith(".")
    return in_top and not _MISTRAL.match(name) and name != "adapter_model.safetensors"


# ---------------------------------------------------------------------------------------------- JSON


def read_json(path: Path) -> tuple[Any, str | None]:
    """The value and None, or None and why it cannot be read. Never raises on content."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return None, f"{path.stat().st_size} bytes, more than any real file of this kind"
        return parse_json(path.read_bytes())
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"


def parse_json(data: bytes) -> tuple[Any, str | None]:
    """As read_json. Duplicate keys and NaN are refused: readers disagree on what they mean."""
    duplicates: list[str] = []

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            duplicates.extend(key for key, _ in pairs if key in seen or seen.add(key))
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=as_dict, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {clip(error)}"
    if duplicates:
        return value, f"key {clip(duplicates[0])!r} twice"
    if _depth_exceeds(value, MAX_JSON_DEPTH):
        return None, f"nested more than {MAX_JSON_DEPTH} deep"
    return value, None


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        lists = [item if isinstance(item, list) else item.values() for item in level if isinstance(item, dict | list)]
        level = [inner for items in lists for inner in items if isinstance(inner, dict | list)]
    return bool(level)


# ---------------------------------------------------------------------------------------------- index


def _read_index(shelf: Shelf) -> dict[str, str] | None:
    """weight_map with its shape proven, or None; faults go to F2, F3 and F9."""
    if INDEX not in shelf.sizes:
        return None
    content, problem = read_json(shelf.path(INDEX))
    if problem:
        shelf.fault("F2", "a JSON object with weight_map", problem, file=INDEX)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        if not problem:
            shelf.fault("F2", "a weight_map of tensor names to files", clip(type(weight_map).__name__), file=INDEX)
        return None
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
    for file in sorted(set(weight_map.values()) - set(shards)):
        lost = {name for name, at in weight_map.items() if at == file}
        shelf.lost |= lost
        shelf.fault("F2", f"the file of {len(lost)} tensors of the index", "no such file", file=file)
    for file in sorted(set(shards) - set(weight_map.values())):
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


def _find_unusable(shelf: Shelf, shards: list[str]) -> None:
    """F9: names that are no weights at all. Such files are not parsed: one fault is enough for each."""
    for name in list(shards):
        reason = _unusable(shelf, name)
        if reason:
            shelf.fault("F9", "the weights themselves", reason, file=name)
            shelf.sizes[name] = -1


def _unusable(shelf: Shelf, name: str) -> str | None:
    path = shelf.path(name)
    if path.is_symlink() and not _stays_inside(path, shelf.root):
        return f"a link to {clip(path.readlink())}, outside the folder"
    if shelf.sizes[name] == 0:
        return "an empty file" if path.exists() else "a link to nothing"
    with path.open("rb") as file:
        return "a Git LFS pointer" if file.read(len(_LFS)) == _LFS else None


def _stays_inside(link: Path, root: Path) -> bool:
    """Inside the folder, or in the blobs beside it when the folder is a snapshot of the Hub cache."""
    target, home = link.resolve(), root.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return target.is_relative_to(home) or target.is_relative_to(cache)


def _read_shard(shelf: Shelf, name: str) -> None:
    size = shelf.sizes[name]
    entries = None if size < 0 else _read_header(shelf, name, size)
    if entries is None:
        if shelf.index is None and INDEX not in shelf.sizes:
            shelf.blind = True
        shelf.lost |= {tensor for tensor, file in (shelf.index or {}).items() if file == name}
        return
    for entry in entries:
        if entry.name in shelf.tensors:
            first = shelf.tensors[entry.name].shard
            shelf.fault("F4", "each tensor in one file", f"also in {first}", file=name, tensor=entry.name)
        if entry.name not in shelf.tensors or (shelf.index or {}).get(entry.name) == name:
            shelf.tensors[entry.name] = entry


def _read_header(shelf: Shelf, name: str, size: int) -> list[TensorInfo] | None:
    """The entries that make sense, or None when the header as a whole does not."""
    with shelf.path(name).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            shelf.fault("F1", f"a header within the file's {size} bytes", f"a header length of {length}", file=name)
            return None
        header, problem = parse_json(file.read(length))
    if problem or not isinstance(header, dict):
        shelf.fault("F1", "a JSON object as header", problem or type(header).__name__, file=name)
    if not isinstance(header, dict):
        return None
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        shelf.fault("F1", "__metadata__ of strings", clip(repr(metadata)), file=name)
    elif (metadata or {}).get("format") != "pt":
        shelf.fault("F8", 'metadata "format": "pt"', clip(repr((metadata or {}).get("format"))), file=name)
    entries = [entry for key, value in header.items() if (entry := _entry(shelf, name, key, value, 8 + length))]
    _prove_contiguous(shelf, name, entries, 8 + length, size, complete=len(entries) == len(header))
    shelf.lost |= {entry.name for entry in entries if entry.end > size}
    return [entry for entry in entries if entry.end <= size]


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


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


# ---------------------------------------------------------------------------------------------- checks


def _of(check_id: str, subject: Subject) -> list[Fault]:
    return subject.shelf.faults.get(check_id, [])


@check(
    "F1",
    "Every safetensors header parses, offsets are contiguous, the file has exactly the size they add up to.",
    consequence="vLLM stops while loading, or reads bytes of another tensor",
    remedy="write or download the file again",
)
def headers_are_exact(subject: Subject) -> list[Fault]:
    return _of("F1", subject)


@check(
    "F2",
    "Several weight files have an index, and every file it names exists.",
    consequence="with an index vLLM stops (FileNotFoundError); without one it loads what is there and leaves the rest "
    "of the weights uninitialised, without a word",
    remedy="download the missing files, or rebuild the index",
)
def index_names_existing_files(subject: Subject) -> list[Fault]:
    return _of("F2", subject)


@check(
    "F3",
    "The index lists exactly the tensors of the files, each in the file that holds it.",
    consequence="vLLM loads by file and does not notice; transformers and other readers miss the tensor",
    remedy="rebuild the index from the headers",
)
def index_lists_the_tensors(subject: Subject) -> list[Fault]:
    return _of("F3", subject)


@check(
    "F4",
    "No tensor lies in two files.",
    consequence="vLLM loads both, the last one read wins, without a word",
    remedy="remove the stale copy",
)
def tensors_are_unique(subject: Subject) -> list[Fault]:
    return _of("F4", subject)


@check(
    "F5",
    "metadata.total_size of the index is the sum of the tensors' bytes.",
    severity="warning",
    consequence="none in vLLM; download tools and the Hub's size display are wrong",
    remedy="rebuild the index",
)
def total_size_adds_up(subject: Subject) -> Iterator[Fault]:
    shelf = subject.shelf
    if shelf.index is None or shelf.lost or shelf.faults.get("F1"):
        return
    content, _ = read_json(shelf.path(INDEX))
    metadata = content.get("metadata")
    found = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.nbytes for entry in shelf.tensors.values())
    if found != total:
        yield Fault(f"total_size {total}", clip(repr(found)), file=INDEX)


@check(
    "F6",
    "No weight file lies beside those that the index names.",
    consequence="readers that do not use the index load it too, and its tensors overwrite the right ones",
    remedy="delete the stale file",
)
def no_stale_shards(subject: Subject) -> list[Fault]:
    return _of("F6", subject)


@check(
    "F7",
    "No file that makes loaders take another path: Mistral's consolidated weights, adapters, pickles, stale configs.",
    consequence="vLLM switches to its Mistral loader, or stops",
    remedy="delete the file",
)
def no_files_of_other_loaders(subject: Subject) -> Iterator[Fault]:
    for name in subject.shelf.sizes:
        if _MISTRAL.match(name):
            yield Fault("Hugging Face layout only", "a file of Mistral's own layout", file=name)
        elif name in {"adapter_model.safetensors", "adapter_config.json"}:
            yield Fault("a full model", "an adapter", file=name, consequence="vLLM reads the folder as an adapter")
        elif "/" not in name and name.endswith((".bin", ".pt", ".pth")) and name != "training_args.bin":
            yield _harmless(name, "pickled weights beside safetensors", "none while safetensors are preferred")
        elif name == "hf_quant_config.json":
            yield _harmless(name, "a second quantization config", "ignored while config.json has its own")


def _harmless(name: str, found: str, consequence: str) -> Fault:
    return Fault("safetensors and config.json only", found, name, severity="warning", consequence=consequence)


@check(
    "F8",
    'Every safetensors header has metadata {"format": "pt"}.',
    severity="warning",
    consequence="none in vLLM; some versions of transformers refuse the file",
    remedy="write the metadata",
)
def metadata_names_the_format(subject: Subject) -> list[Fault]:
    return _of("F8", subject)


@check(
    "F9",
    "Weight files are weights: no Git LFS pointer, no empty file, no link or name that leaves the folder.",
    consequence="vLLM stops on the header; a name that leaves the folder reads somebody else's file",
    remedy="download the file itself (git lfs pull, hf download)",
)
def files_are_real(subject: Subject) -> list[Fault]:
    return _of("F9", subject)
