"""Headers of hostile files are refused before use; laid out files are what safetensors reads."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fp8pipe.errors import EnvironmentFault, Fp8PipeError, MalformedCheckpoint, SourceChanged
from fp8pipe.hub import source
from fp8pipe.hub.headers import read_headers
from fp8pipe.model.headers import ITEM_BYTES, Headers, header_bytes, index_bytes, lay_out, parse_header
from fp8pipe.model.shards import OutputShard, SourceFiles, partial_path


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
    "empty file": (b"", "too few"),
    "only a length": ((9).to_bytes(8, "little"), "claims 9 bytes"),
    "header larger than the file": (blob({"a": entry()}, bytes(8), length=10_000), "claims 10000"),
    "header of exabytes": (blob({}, length=2**63), "claims"),
    "header is not JSON": (blob(b"{nope"), "not JSON"),
    "header is not text": (blob(b"\xff\xfe{}"), "not JSON"),
    "header is a list": (blob([]), "expected an object"),
    "header nested without end": (blob(b"[" * 100_000), "not JSON"),
    "a name twice": (blob(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), "twice"),
    "metadata is a list": (blob({"__metadata__": []}), "__metadata__"),
    "metadata holds numbers": (blob({"__metadata__": {"format": 1}}), "__metadata__"),
    "entry is a string": (blob({"a": "x"}), "expected dtype, shape"),
    "entry has another key": (blob({"a": entry() | {"url": "x"}}, bytes(8)), "expected dtype, shape"),
    "unknown dtype": (blob({"a": entry("F4")}, bytes(8)), "unknown dtype"),
    "dtype is a list": (blob({"a": entry() | {"dtype": "[]"}}, bytes(8)), "unknown dtype"),
    "negative size": (blob({"a": entry(shape=[-2, -2])}, bytes(8)), "not a list"),
    "fractional size": (blob({"a": entry(shape=[2.0, 2])}, bytes(8)), "not a list"),
    "size is true": (blob({"a": entry(shape=[True, 4])}, bytes(8)), "not a list"),
    "absurd size": (blob({"a": entry(shape=[2**62, 2**62])}, bytes(8)), "takes"),
    "absurdly many dimensions": (blob({"a": entry(shape=[1] * 5000 + [4])}, bytes(8)), "not a list"),
    "shape and offsets disagree": (blob({"a": entry(shape=[2, 3])}, bytes(8)), "takes 12 bytes"),
    "offsets reversed": (blob({"a": entry(offsets=[8, 0])}, bytes(8)), "not [begin, end]"),
    "offsets negative": (blob({"a": entry(offsets=[-8, 0])}, bytes(8)), "not [begin, end]"),
    "three offsets": (blob({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "not [begin, end]"),
    "tensors overlap": (blob({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
    "tensors coincide": (blob({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "hole between tensors": (blob({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "hole"),
    "hole before the first": (blob({"a": entry(offsets=[4, 12])}, bytes(12)), "hole"),
    "data cut off": (GOOD[:-1], "cut off"),
    "data after the last": (GOOD + b"x", "no tensor owns"),
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
        "a is in 1.safetensors and",
    ),
    "swapped": (TWO, {"a": "2.safetensors", "b": "1.safetensors"}, "a should be in 2.safetensors, it is in 1"),
    "listed but absent": (TWO, {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}, "no file holds it"),
    "present but unlisted": (TWO | {"2.safetensors": MORE}, {"a": "1.safetensors", "b": "2.safetensors"}, "not in the"),
    "leaves the folder": ({"1.safetensors": A}, {"a": "../1.safetensors"}, "an index may not lead elsewhere"),
    "leaves it deeper down": ({"1.safetensors": A}, {"a": "x/../../1.safetensors"}, "an index may not lead elsewhere"),
    "absolute": ({"1.safetensors": A}, {"a": "/etc/1.safetensors"}, "an index may not lead elsewhere"),
    "backslashes": ({"1.safetensors": A}, {"a": "..\\1.safetensors"}, "an index may not lead elsewhere"),
    "null byte": ({"1.safetensors": A}, {"a": "1\0.safetensors"}, "an index may not lead elsewhere"),
    "missing file": ({"1.safetensors": A}, {"a": "gone.safetensors"}, "gone.safetensors"),
    "not safetensors": ({"1.safetensors": A}, {"a": "config.json"}, "is no file of this folder"),
    "not a name": ({"1.safetensors": A}, {"a": 1}, "1 is no file"),
    "not a mapping": ({"1.safetensors": A}, [], "expected a JSON object with weight_map"),
    "one shard cut off": (TWO | {"2.safetensors": B[:-1]}, {"a": "1.safetensors", "b": "2.safetensors"}, "is cut off"),
    "one header too long": (
        TWO | {"2.safetensors": blob({"b": entry()}, bytes(8), length=1 << 40)},
        {"a": "1.safetensors", "b": "2.safetensors"},
        "2.safetensors: its header claims",
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


# ---------------------------------------------------------------------------------------------- writing


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["BF16", "F32", "F8_E4M3", "F16"]), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    )
)
def test_a_laid_out_file_is_aligned_contiguous_and_says_what_was_asked(
    specs: list[tuple[str, list[int]]],
) -> None:
    asked = [(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(specs)]
    placed = lay_out("x.safetensors", asked)
    begin = placed[0].begin if placed else len(header_bytes((), 0))
    size = placed[-1].end if placed else begin
    header = parse_header("x.safetensors", size, header_bytes(placed, begin))
    assert {(info.name, info.dtype, info.shape) for info in header.tensors} == set(asked)
    assert all(info.begin % ITEM_BYTES[info.dtype] == 0 for info in placed)
    assert begin % 8 == 0


def test_a_written_shard_is_hidden_until_it_is_whole_and_then_loads(tmp_path: Path) -> None:
    placed = lay_out("x.safetensors", [("w", "F8_E4M3", (2, 3)), ("s", "F32", (1,))])
    path = tmp_path / "x.safetensors"
    with ExitStack() as stack:
        shard = OutputShard(path, placed, stack)
        for info in placed:
            shard.write_at(info.begin, memoryview(b"\x01" * info.nbytes))
        assert not path.exists()
        assert [found.name for found in tmp_path.iterdir()] == [".x.safetensors.partial"]
        shard.finish()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.get_tensor("w").shape) == [2, 3]
    assert not partial_path(path).exists()


def test_what_an_earlier_run_left_longer_is_cut_to_the_planned_size(tmp_path: Path) -> None:
    placed = lay_out("x.safetensors", [("w", "F8_E4M3", (2, 3))])
    path = tmp_path / "x.safetensors"
    partial_path(path).write_bytes(b"\xff" * 10_000)
    with ExitStack() as stack:
        shard = OutputShard(path, placed, stack)
        shard.write_at(placed[0].begin, memoryview(bytes(6)))
        shard.finish()
    assert path.stat().st_size == placed[0].end
    with safe_open(path, "pt") as file:
        assert file.get_tensor("w").float().sum() == 0


def test_the_index_maps_every_tensor_and_counts_data_bytes() -> None:
    placed = lay_out("x.safetensors", [("w", "BF16", (2, 3))])
    assert json.loads(index_bytes(placed)) == {"metadata": {"total_size": 12}, "weight_map": {"w": "x.safetensors"}}


# ---------------------------------------------------------------------------------------------- reading


def opened(folder: Path, stack: ExitStack) -> SourceFiles:
    files = SourceFiles(folder, stack)
    files.open("1.safetensors")
    return files


def test_reads_are_positional_and_whole(tmp_path: Path) -> None:
    (tmp_path / "1.safetensors").write_bytes(bytes(range(100)))
    buffer = bytearray(10)
    with ExitStack() as stack:
        opened(tmp_path, stack).read_into("1.safetensors", 40, memoryview(buffer), "w")
    assert bytes(buffer) == bytes(range(40, 50))


@pytest.mark.parametrize("change", ["grow", "touch", "replace", "remove"])
def test_a_source_that_changes_is_noticed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "1.safetensors"
    path.write_bytes(bytes(100))
    with ExitStack() as stack:
        files = opened(tmp_path, stack)
        files.check_unchanged("1.safetensors")
        if change == "grow":
            path.write_bytes(bytes(101))
        elif change == "touch":
            import os

            os.utime(path, ns=(1, 1))
        elif change == "replace":
            (tmp_path / "2").write_bytes(bytes(100))
            (tmp_path / "2").replace(path)
        else:
            path.unlink()
        with pytest.raises(SourceChanged):
            files.check_unchanged("1.safetensors")


def test_a_source_that_is_cut_off_while_read_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "1.safetensors"
    path.write_bytes(bytes(100))
    with ExitStack() as stack:
        files = opened(tmp_path, stack)
        path.write_bytes(bytes(50))
        with pytest.raises(SourceChanged, match=r"layers\.0\.w.*byte 50"):
            files.read_into("1.safetensors", 40, memoryview(bytearray(20)), "layers.0.w")


def test_a_read_error_names_tensor_file_and_byte(tmp_path: Path) -> None:
    (tmp_path / "1.safetensors").mkdir()  # reading a directory fails as a broken disk does: with an errno
    with ExitStack() as stack:
        files = opened(tmp_path, stack)
        with pytest.raises(EnvironmentFault, match=r"layers\.0\.w: cannot read .*1\.safetensors at byte 8"):
            files.read_into("1.safetensors", 8, memoryview(bytearray(4)), "layers.0.w")
    assert issubclass(EnvironmentFault, Fp8PipeError)


def test_index_states_every_tensor_and_the_sum_of_their_bytes_also_from_a_generator():
    from fp8pipe.model.headers import TensorInfo, index_bytes

    tensors = [
        TensorInfo("a", "BF16", (2, 3), "one.safetensors", 0, 12),
        TensorInfo("b", "F32", (), "two.safetensors", 0, 4),
    ]
    index = json.loads(index_bytes(info for info in tensors))
    assert index == {"metadata": {"total_size": 16}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
