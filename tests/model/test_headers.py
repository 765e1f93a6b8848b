"""Headers and indexes of hostile files are refused before use, by the engine and by the validator alike."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8pipe.errors import MalformedCheckpoint
from fp8pipe.hub import source
from fp8pipe.hub.headers import read_headers
from fp8pipe.model.headers import Headers, parse_header, read_header
from fp8pipe.validate import validate


def blob(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header (text or JSON) and data, whatever they say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "BF16", shape: Any = (2, 2), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def parse(content: bytes) -> Any:
    return parse_header("model.safetensors", len(content), content)


GOOD = blob({"a": entry()}, bytes(8))

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "header"),
    "only a length": ((9).to_bytes(8, "little"), "length of 9"),
    "header larger than the file": (blob({"a": entry()}, bytes(8), length=10_000), "length of 10000"),
    "header of exabytes": (blob({}, length=2**63), "length of 9223372036854775808"),
    "header is not JSON": (blob(b"{nope"), "not JSON"),
    "header is not text": (blob(b"\xff\xfe{}"), "not JSON"),
    "header is a list": (blob([]), "found list"),
    "header nested without end": (blob(b"[" * 100_000), "not JSON"),
    "a name twice": (blob(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), "'a' twice"),
    "metadata is a list": (blob({"__metadata__": []}), "__metadata__"),
    "metadata holds numbers": (blob({"__metadata__": {"format": 1}}), "__metadata__"),
    "entry is a string": (blob({"a": "x"}), "dtype, shape and data_offsets"),
    "entry has another key": (blob({"a": entry() | {"url": "x"}}, bytes(8)), "dtype, shape and data_offsets"),
    "unknown dtype": (blob({"a": entry("F4")}, bytes(8)), "found 'F4'"),
    "dtype is text of a list": (blob({"a": entry() | {"dtype": "[]"}}, bytes(8)), "found '[]'"),
    "dtype is a list": (blob({"a": entry() | {"dtype": []}}, bytes(8)), "found []"),
    "a name of a megabyte": (blob({"a" * 1_000_000: entry()}, bytes(8)), "a name of at most 1000 printable characters"),
    "a name that a terminal obeys": (blob({"\x1b[2Ja": entry()}, bytes(8)), "found '\\x1b[2Ja'"),
    "negative size": (blob({"a": entry(shape=[-2, -2])}, bytes(8)), "a shape of"),
    "fractional size": (blob({"a": entry(shape=[2.0, 2])}, bytes(8)), "a shape of"),
    "size is true": (blob({"a": entry(shape=[True, 4])}, bytes(8)), "a shape of"),
    "absurd size": (blob({"a": entry(shape=[2**62, 2**62])}, bytes(8)), "bytes for BF16"),
    "17 dimensions": (blob({"a": entry(shape=[1] * 16 + [4])}, bytes(8)), "a shape of"),
    "5000 dimensions": (blob({"a": entry(shape=[1] * 5000 + [4])}, bytes(8)), "a shape of"),
    "shape and offsets disagree": (blob({"a": entry(shape=[2, 3])}, bytes(8)), "12 bytes for BF16 [2, 3], found 8"),
    "offsets reversed": (blob({"a": entry(offsets=[8, 0])}, bytes(8)), "[begin, end]"),
    "offsets negative": (blob({"a": entry(offsets=[-8, 0])}, bytes(8)), "[begin, end]"),
    "three offsets": (blob({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "[begin, end]"),
    "tensors overlap": (blob({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "inside another tensor"),
    "tensors coincide": (blob({"a": entry(), "b": entry()}, bytes(8)), "inside another tensor"),
    "hole between tensors": (blob({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "a gap"),
    "hole before the first": (blob({"a": entry(offsets=[4, 12])}, bytes(12)), "a gap"),
    "data cut off": (GOOD[:-1], f"a file of {len(GOOD)} bytes"),
    "data after the last": (GOOD + b"x", f"a file of {len(GOOD)} bytes"),
}


def test_a_sound_header_is_read() -> None:
    header = parse(blob({"__metadata__": {"format": "pt"}, "b": entry(offsets=[8, 16]), "a": entry()}, bytes(16)))
    assert [(info.name, info.shape, info.dtype) for info in header.tensors] == [
        ("a", (2, 2), "BF16"),
        ("b", (2, 2), "BF16"),
    ]
    assert header.tensors[0].begin == header.data_begin
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case: str) -> None:
    content, message = HOSTILE[case]
    with pytest.raises(MalformedCheckpoint) as caught:
        parse(content)
    assert message in str(caught.value)


@pytest.mark.parametrize("case", HOSTILE)
def test_validator_reports_the_fault_that_stops_the_engine(tmp_path: Path, case: str) -> None:
    content, _ = HOSTILE[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    faults = [f for f in validate(tmp_path, depth="headers").findings if f.check == ("F1" if content else "F9")]
    assert faults
    if content:
        with pytest.raises(MalformedCheckpoint) as caught:
            parse(content)
        assert f"expected {faults[0].expected}, found {faults[0].found}" in str(caught.value)


def test_every_fault_of_a_header_is_collected() -> None:
    rows = {"__metadata__": [], "a": entry("F4"), "b": entry(offsets=[8, 16]), "c": entry(offsets=[12, 20]), "d": 1}
    content = blob(rows, bytes(24))
    reading = read_header("model.safetensors", len(content), content)
    assert [fault.tensor for fault in reading.faults] == [None, "a", "d", "c"]
    assert [info.name for info in reading.tensors] == ["b", "c"] and reading.lost == ["a", "d"]


def test_metadata_may_be_null_as_in_the_safetensors_library() -> None:
    assert parse(blob({"__metadata__": None, "a": entry()}, bytes(8))).metadata == {}


def test_sixteen_dimensions_are_read() -> None:
    assert parse(blob({"a": entry(shape=[1] * 15 + [4])}, bytes(8))).tensors[0].shape == (1,) * 15 + (4,)


@pytest.mark.timeout(60)
def test_header_of_sixty_thousand_entries_with_a_name_twice_is_refused_in_linear_time() -> None:
    rows = [f'"{number}":{json.dumps(entry(shape=[0], offsets=[0, 0]))}' for number in range(60_000)]
    with pytest.raises(MalformedCheckpoint, match="'59999' twice"):
        parse(blob(f"{{{','.join([*rows, rows[-1]])}}}".encode()))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 2**64 - 1))
def test_no_bytes_do_more_than_be_refused(text: bytes, length: int) -> None:
    for content in (text, blob(text), blob(text, length=length)):
        with suppress(MalformedCheckpoint):
            parse(content)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_flipped_byte_of_a_header_is_refused_or_harmless(data: st.DataObject) -> None:
    content = bytearray(blob({"a": entry(), "b": entry("F32", [3], [8, 20])}, bytes(20)))
    content[data.draw(st.integers(0, len(content) - 21))] = data.draw(st.integers(0, 255))
    try:
        header = parse(bytes(content))
    except MalformedCheckpoint:
        return
    for info in header.tensors:
        assert header.data_begin <= info.begin <= info.end <= len(content)


# ---------------------------------------------------------------------------------------------- folders


def folder_with(path: Path, files: dict[str, bytes], index: Any = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    for name, content in files.items():
        (path / name).write_bytes(content)
    if index is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def headers_of(folder: Path) -> Headers:
    return read_headers(source.resolve(str(folder)))


A, B = blob({"a": entry()}, bytes(8)), blob({"b": entry()}, bytes(8))


def test_shards_and_index_that_agree_are_read(tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    headers = headers_of(folder_with(tmp_path / "m", {"1.safetensors": A, "2.safetensors": B}, index))
    assert list(headers.tensors) == ["a", "b"]
    assert headers.nbytes == len(A) + len(B)


TWO = {"1.safetensors": A, "2.safetensors": B}
MORE = blob({"b": entry(), "c": entry(offsets=[8, 16])}, bytes(16))

DISAGREE: dict[str, tuple[dict[str, bytes], Any, str]] = {
    "duplicate tensor": (
        {"1.safetensors": A, "2.safetensors": A},
        {"a": "1.safetensors", "b": "2.safetensors"},
        "also in 1.safetensors",
    ),
    "swapped": (TWO, {"a": "2.safetensors", "b": "1.safetensors"}, "in 1.safetensors, where the tensor is, found in 2"),
    "listed but absent": (TWO, {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}, "found not in it"),
    "present but unlisted": (
        TWO | {"2.safetensors": MORE},
        {"a": "1.safetensors", "b": "2.safetensors"},
        "absent from it",
    ),
    "leaves the folder": ({"1.safetensors": A}, {"a": "../1.safetensors"}, "a file name without folders"),
    "folder below": ({"1.safetensors": A}, {"a": "x/1.safetensors"}, "a file name without folders"),
    "leaves it deeper down": ({"1.safetensors": A}, {"a": "x/../../1.safetensors"}, "a file name without folders"),
    "absolute path": ({"1.safetensors": A}, {"a": "/etc/1.safetensors"}, "a file name without folders"),
    "backslashes": ({"1.safetensors": A}, {"a": "..\\1.safetensors"}, "a file name without folders"),
    "null byte": ({"1.safetensors": A}, {"a": "1\0.safetensors"}, "a file name without folders"),
    "a tensor that a terminal obeys": ({"1.safetensors": A}, {"\x1b[2J": "1.safetensors"}, "printable characters"),
    "a file of a megabyte's name": ({"1.safetensors": A}, {"a": "1" * 1_000_000}, "at most 1000 printable"),
    "thousands of files": ({"1.safetensors": A}, {f"{n}": f"{n}.safetensors" for n in range(10_001)}, "10000 files"),
    "missing file": ({"1.safetensors": A}, {"a": "gone.safetensors"}, "gone.safetensors"),
    "not safetensors": ({"1.safetensors": A}, {"a": "config.json"}, "no safetensors"),
    "not a name": ({"1.safetensors": A}, {"a": 1}, "found 1"),
    "not a mapping": ({"1.safetensors": A}, [], "expected a weight_map"),
    "one shard cut off": (
        TWO | {"2.safetensors": B[:-1]},
        {"a": "1.safetensors", "b": "2.safetensors"},
        f"a file of {len(B)} bytes",
    ),
    "one header too long": (
        TWO | {"2.safetensors": blob({"b": entry()}, bytes(8), length=1 << 40)},
        {"a": "1.safetensors", "b": "2.safetensors"},
        "2.safetensors: expected a header",
    ),
}


@pytest.mark.parametrize("case", DISAGREE)
def test_shards_and_index_that_disagree_are_refused(tmp_path: Path, case: str) -> None:
    files, weight_map, message = DISAGREE[case]
    (tmp_path / "1.safetensors").write_bytes(A)
    folder = folder_with(tmp_path / "m", files, {"weight_map": weight_map})
    with pytest.raises(MalformedCheckpoint) as caught:
        headers_of(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("index", [b"", b"[", b"[]", b'{"weight_map": {"a": "1.safetensors", "a": "1.safetensors"}}'])
def test_an_index_that_is_no_index_is_refused(tmp_path: Path, index: bytes) -> None:
    folder = folder_with(tmp_path / "m", {"1.safetensors": A})
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(MalformedCheckpoint, match=r"index\.json"):
        headers_of(folder)
