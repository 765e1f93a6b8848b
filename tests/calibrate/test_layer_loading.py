"""The skeleton: one layer's weights are in memory at a time, exactly as the checkpoint has them."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.calibration import (
    STATIC_KV,
    calibrated,
    make_model,
    planned,
    run_calibration,
    samples_of,
    with_data,
    write_dataset,
)
from support.whole_model import CLOSE

from fp8pipe.calibrate.forward import run
from fp8pipe.calibrate.resume import Bookmark
from fp8pipe.calibrate.skeleton import Skeleton
from fp8pipe.calibrate.targets import Schemes, targets_of
from fp8pipe.config import Recipe
from fp8pipe.errors import SourceChanged, UnsupportedArchitecture
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.shards import SourceFiles
from fp8pipe.oracle.loading import OnDisk
from fp8pipe.progress import ProgressEvent
from fp8pipe.quantize import quantize
from fp8pipe.quantize.numerics import dequantize


def test_one_layer_has_weights_at_a_time(llama: Path, tmp_path: Path) -> None:
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    snapshot, plan, architecture = planned(llama, recipe)
    loaded: list[set[str]] = []
    with ExitStack() as stack:
        skeleton = Skeleton(snapshot.path, read_headers(snapshot), SourceFiles(snapshot.path, stack), "cpu")

        def progress(event: ProgressEvent) -> None:
            real = {name for name, tensor in skeleton.model.named_parameters() if not tensor.is_meta}
            loaded.append({layer for name in real if (layer := skeleton.layer_of(name)) is not None})

        samples, bookmark = samples_of(llama, recipe), Bookmark(tmp_path / "partial", "key", "tokens")
        targets = targets_of(plan, architecture)
        run(skeleton, targets, samples.token_ids, Schemes.of(recipe), bookmark, progress=progress)
    assert [layers for layers in loaded if len(layers) != 1] == []
    order = [min(layers) for layers in loaded]
    assert order == sorted(order)
    assert set(order) == {f"model.layers.{layer}" for layer in range(4)}


def test_a_weight_is_read_from_disk_as_safetensors_reads_it(tmp_path: Path) -> None:
    source = {
        "bf16": torch.randn(5, 7).bfloat16(),
        "f16": torch.randn(3, 1000, 1000).half(),  # more than a large page
        "f32": torch.randn(()),
        "f64": torch.randn(3).double(),
        "codes": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "ids": torch.arange(9),
        "mask": torch.tensor([True, False]),
        "nothing": torch.empty(0, 4),
    }
    save_file(source, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    headers = read_headers(resolve(str(tmp_path)))
    with ExitStack() as stack:
        files = SourceFiles(tmp_path, stack)
        files.open("model.safetensors")
        read = {name: OnDisk(files, info)[...] for name, info in headers.tensors.items()}
    for name, expected in source.items():
        assert read[name].dtype == expected.dtype and read[name].shape == expected.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_layers_that_share_weights_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "zamba2")
    with pytest.raises(
        UnsupportedArchitecture, match=r"layers\.3 and model\.layers\.1 share shared_transformer\..*weight"
    ):
        calibrated(tmp_path, STATIC_KV)


def test_a_source_that_changes_while_it_is_calibrated_is_an_error(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama")
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))

    def touch(event: ProgressEvent) -> None:
        if event.note == "model.layers.1":
            for path in (tmp_path / "model").glob("*.safetensors"):
                os.utime(path, ns=(1, 1))

    with pytest.raises(SourceChanged, match="was changed while it was read"):
        run_calibration(tmp_path / "model", recipe, tmp_path / "out", touch)
    assert not (tmp_path / "out" / "calibration.json").exists()


@pytest.mark.parametrize("strategy", ["tensor", "block"])
def test_an_fp8_source_has_the_ranges_of_its_dequantized_weights(strategy: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama")
    data = write_dataset(tmp_path / "data.jsonl")
    shipped = Recipe.model_validate(
        {
            "name": "source",
            "checkpoint_format": "fp8",
            "weights": {"strategy": strategy, "block_shape": [32, 32]},
            "activations": {"mode": "dynamic", "strategy": "group" if strategy == "block" else "tensor"},
        }
    )
    snapshot, plan, _ = planned(tmp_path / "model", shipped)
    quantize(snapshot, plan, tmp_path / "fp8-source")
    names = {output.name: output for output in plan.outputs if output.role == "weight"}
    content: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "fp8-source").glob("*.safetensors"):
        content |= load_file(path)
    reference = Path(shutil.copytree(tmp_path / "model", tmp_path / "bf16"))
    for path in reference.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors.keys() & names.keys():
            block = (32, 32) if strategy == "block" else None
            scale = content[f"{name}_scale_inv" if block else f"{name}_scale"]
            tensors[name] = dequantize(content[name], scale, block=block)
        save_file(tensors, path, metadata={"format": "pt"})

    recipe = with_data(STATIC_KV, data).model_copy(update={"fp8_source": "requantize"})
    found = run_calibration(tmp_path / "fp8-source", recipe, tmp_path / "out")
    expected = run_calibration(reference, recipe, tmp_path / "expected")
    assert found.inputs == pytest.approx(expected.inputs, rel=CLOSE)
