"""Threads, stripes and devices change no byte; a device that is missing or unknown is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.quantizing import SCHEMES, Models, bytes_of, make
from support.tiny_models import plan_of, recipe

from fp8pipe import stages
from fp8pipe.errors import InputError, NoSuitableDevice
from fp8pipe.hub.source import resolve
from fp8pipe.quantize import device_for
from fp8pipe.quantize.engine import kept, views

RAGGED = {"head_dim": 64, "intermediate_size": 384, "hidden_size": 200}
SMALL = {
    "num_hidden_layers": 1,
    "vocab_size": 8,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""So few elements that stripes of one row, and copies of one element, take little time."""


@pytest.mark.parametrize("scheme", ["channel", "tensor mse", "block mse"])
@pytest.mark.parametrize("stripe", [1, 5000, 1 << 30])
def test_stripes_change_no_byte(
    model_folder: Models, tmp_path: Path, scheme: str, stripe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_folder("llama", **(RAGGED | SMALL if stripe == 1 else RAGGED))
    make(source, recipe(**SCHEMES[scheme]), tmp_path / "one", threads=1)
    monkeypatch.setattr(views, "STRIPE_BYTES", stripe)
    monkeypatch.setattr(kept, "STRIPE_BYTES", stripe)
    make(source, recipe(**SCHEMES[scheme]), tmp_path / "many", threads=3)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "many")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_two_and_three_threads_write_the_same_bytes(model_folder: Models, tmp_path: Path, scheme: str) -> None:
    source = model_folder("llama", **RAGGED)
    for threads in (1, 2, 3):
        make(source, recipe(**SCHEMES[scheme]), tmp_path / str(threads), threads=threads)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2") == bytes_of(tmp_path / "3")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_writes_the_bytes_of_the_cpu(model_folder: Models, tmp_path: Path, scheme: str, dtype: str) -> None:
    source = model_folder("llama", dtype=dtype, **RAGGED)
    for device in ("cpu", "cuda"):
        make(source, recipe(**SCHEMES[scheme]), tmp_path / device, device=device)
    assert bytes_of(tmp_path / "cpu") == bytes_of(tmp_path / "cuda")


@pytest.mark.parametrize(("asked", "used"), [("auto", "cpu"), ("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1")])
def test_weights_are_quantized_on_the_cpu_unless_a_gpu_is_named(asked: str, used: str) -> None:
    assert device_for(asked) == used


def test_a_stage_quantizes_on_the_device_it_is_given(model_folder: Models, tmp_path: Path) -> None:
    snapshot = resolve(str(model_folder("llama")))
    plan = plan_of(model_folder("llama"), recipe())
    with pytest.raises(NoSuitableDevice, match="cuda:99"):
        stages.quantize(snapshot, plan, tmp_path / "out", calibration=None, device="cuda:99")
    for device in ("auto", "cpu"):
        stages.quantize(snapshot, plan, tmp_path / device, calibration=None, device=device)
        assert (tmp_path / device / "config.json").exists()


@pytest.mark.parametrize("device", ["xyz", "cuda:", "cuda:x", "mps", ""])
def test_an_unknown_device_is_refused_and_nothing_is_written(model_folder: Models, tmp_path: Path, device: str) -> None:
    with pytest.raises(InputError, match="expected auto, cpu, cuda"):
        make(model_folder("llama"), recipe(), tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


def test_a_missing_gpu_is_refused_and_nothing_is_written(model_folder: Models, tmp_path: Path) -> None:
    with pytest.raises(NoSuitableDevice, match=r"cuda:99: torch finds \d+ GPUs"):
        make(model_folder("llama"), recipe(), tmp_path / "out", device="cuda:99")
    assert not (tmp_path / "out").exists()
