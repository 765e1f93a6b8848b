"""Written files are what safetensors reads, appear only when they are complete, and sources that change are noticed."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fp8pipe.errors import EnvironmentFault, SourceChanged
from fp8pipe.model.headers import ITEM_BYTES, TensorInfo, header_bytes, index_bytes, lay_out, parse_header
from fp8pipe.model.shards import OutputShard, SourceFiles, partial_path

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


def test_index_of_several_files_is_made_from_any_iterable() -> None:
    tensors = [
        TensorInfo("a", "BF16", (2, 3), "one.safetensors", 0, 12),
        TensorInfo("b", "F32", (), "two.safetensors", 0, 4),
    ]
    index = json.loads(index_bytes(info for info in tensors))
    assert index == {"metadata": {"total_size": 16}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}


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
