"""A calibration is reused when its key matches; the key follows everything that decides the ranges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.calibration import STATIC_KV, run_calibration, with_data, write_dataset

from fp8pipe.calibrate import calibration_key, cpu_linear
from fp8pipe.hub.source import resolve
from fp8pipe.progress import ProgressEvent


def test_a_matching_record_is_reused_and_a_changed_setting_makes_a_new_one(llama: Path, tmp_path: Path) -> None:
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    first = run_calibration(llama, recipe, tmp_path / "out")
    calls: list[ProgressEvent] = []
    assert run_calibration(llama, recipe, tmp_path / "out", calls.append) == first
    assert calls == []
    changed = with_data(STATIC_KV, tmp_path / "data.jsonl", max_seq_len=4)
    assert run_calibration(llama, changed, tmp_path / "out", calls.append).key != first.key
    assert calls


def test_the_key_follows_data_and_instructions_but_no_path_or_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = resolve(str(llama))
    here, there = write_dataset(tmp_path / "a.jsonl"), write_dataset(tmp_path / "b.jsonl")
    key = calibration_key(snapshot, with_data(STATIC_KV, here))
    assert calibration_key(snapshot, with_data(STATIC_KV, there)) == key
    write_dataset(there, [{"text": "other"}])
    assert calibration_key(snapshot, with_data(STATIC_KV, there)) != key
    renamed = with_data(STATIC_KV, here).model_copy(update={"name": "other"})
    assert calibration_key(snapshot, renamed) == key
    was_native = not cpu_linear.is_emulated(torch.bfloat16, torch.device("cpu"))
    monkeypatch.setitem(cpu_linear.NATIVE, torch.bfloat16, lambda: not was_native)
    assert calibration_key(snapshot, with_data(STATIC_KV, here)) != key
