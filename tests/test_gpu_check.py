"""`make gpu-check` runs where nothing but torch, transformers and numba is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import products

ROOT = Path(__file__).parents[1]
BARE = """
import importlib.util, sys
ABSENT = {"pydantic", "prefect", "vllm", "lm_eval", "datasets", "compressed_tensors", "accelerate", "sklearn"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in ABSENT else find(name, package)
"""
PARTS = """
import pathlib, tempfile, torch
import benchmarks.gpu_check.__main__ as check
assert not check.HAS_PYDANTIC
from benchmarks.gpu_check import calibration, products, weights
from benchmarks.llama import TINY, make_llama

cpu = torch.device("cpu")
rows = [*products.rows(cpu, quick=True), *weights._same_bytes(cpu)]
assert [row.name for row in rows if row.passed is False] == []
assert sum(row.passed is True for row in rows) >= 4
with tempfile.TemporaryDirectory() as folder:
    model = make_llama(pathlib.Path(folder) / "model", 1, TINY)
    ranges = calibration.calibrate(model, calibration.tokens(2, 8), cpu)
assert len(ranges.inputs) == 7 and len(ranges.kv) == 1 and min(ranges.inputs.values()) > 0
"""


def test_the_check_needs_no_package_of_ours() -> None:
    command = [sys.executable, "-c", BARE + PARTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_missing_product_fails_the_check_unless_it_is_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> torch.Tensor:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    rows = {row.name: row for row in products.rows(torch.device("cpu"), quick=True)}
    assert not rows["torch._scaled_mm per tensor"].passed
    assert not rows["torch._scaled_mm per channel and token"].passed
    assert rows["torch._scaled_mm in blocks"].passed
