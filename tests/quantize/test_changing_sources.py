"""A source that changes, cannot be read or arrives late: an error that names it, and a next run that resumes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.quantizing import SCHEMES, Models, bytes_of, journalled, make
from support.tiny_models import plan_of, recipe

from fp8pipe.errors import EnvironmentFault, InputError, SourceChanged
from fp8pipe.hub.source import resolve
from fp8pipe.quantize import quantize


def test_a_source_that_changes_while_it_is_read_stops_the_run(model_folder: Models, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama"), source)
    plan, snapshot = plan_of(source, recipe()), resolve(str(source))

    def arriving() -> Iterator[Path]:
        yield from sorted(source.glob("*.safetensors"))[:-1]
        for path in source.glob("*.safetensors"):
            os.utime(path, ns=(1, 1))
        yield sorted(source.glob("*.safetensors"))[-1]

    with pytest.raises(SourceChanged):
        quantize(snapshot, plan, tmp_path / "out", arriving=arriving())
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("change", ["weights", "header", "config", "removed"])
def test_a_source_that_changed_since_it_was_pinned_is_refused_and_nothing_is_written(
    model_folder: Models, tmp_path: Path, change: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama"), source)
    plan, snapshot = plan_of(source, recipe()), resolve(str(source))
    shard = source / plan.tensors[0].shard
    content, stat = bytearray(shard.read_bytes()), shard.stat()
    if change == "weights":
        content[-2:] = bytes(2)
        shard.write_bytes(content)
    elif change == "header":  # of the same length and time
        shard.write_bytes(content.replace(b"BF16", b"F16 ").replace(b'F16 "', b'F16" '))
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "config":
        (source / "config.json").write_text((source / "config.json").read_text() + " ")
    else:
        shard.unlink()
    with pytest.raises(SourceChanged, match="has changed since"):
        quantize(snapshot, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["channel", "tensor", "block mse"])
@pytest.mark.parametrize("fault", ["cut off", "unreadable"])
def test_an_unreadable_source_names_tensor_and_byte_and_the_next_run_resumes(
    model_folder: Models, tmp_path: Path, fault: str, scheme: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model_folder("llama"), source)
    plan, snapshot = plan_of(source, recipe(**SCHEMES[scheme])), resolve(str(source))
    *others, last = sorted(source.glob("*.safetensors"))
    names = "|".join(map(re.escape, load_file(last)))  # threads read them: any can be the first to fail
    aside = tmp_path / "aside"

    def arriving() -> Iterator[Path]:
        yield from others
        last.rename(aside)
        if fault == "cut off":
            last.write_bytes(aside.read_bytes()[: aside.stat().st_size // 2])
        else:
            last.mkdir()  # reading a directory fails as a broken disk does: with an errno
        yield last

    expected, where = (SourceChanged, "ends at") if fault == "cut off" else (EnvironmentFault, "cannot read")
    with pytest.raises(expected, match=rf"^({names}): .*{where}.*byte \d+") as caught:
        quantize(snapshot, plan, out, arriving=arriving())
    assert last.name in str(caught.value)
    assert not (out / "config.json").exists()
    assert journalled(out)
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    aside.rename(last)
    quantize(snapshot, plan, out)
    make(source, recipe(**SCHEMES[scheme]), tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


def test_a_plan_for_another_state_of_the_source_is_refused(model_folder: Models, tmp_path: Path) -> None:
    plan = plan_of(model_folder("llama"), recipe())
    with pytest.raises(InputError, match="plan again"):
        quantize(resolve(str(model_folder("llama-tied"))), plan, tmp_path / "out")


def test_a_shard_that_never_arrives_is_an_error(model_folder: Models, tmp_path: Path) -> None:
    source = model_folder("llama")
    some = sorted(source.glob("*.safetensors"))[:1]
    with pytest.raises(EnvironmentFault, match="did not arrive"):
        quantize(resolve(str(source)), plan_of(source, recipe()), tmp_path / "out", arriving=some)


def test_shards_may_arrive_in_any_order(model_folder: Models, tmp_path: Path) -> None:
    source = model_folder("llama")
    plan = plan_of(source, recipe("autofp8-dynamic"))
    quantize(resolve(str(source)), plan, tmp_path / "late", arriving=sorted(source.glob("*"), reverse=True))
    quantize(resolve(str(source)), plan, tmp_path / "all")
    assert bytes_of(tmp_path / "late") == bytes_of(tmp_path / "all")
