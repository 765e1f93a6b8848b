"""docs/served.md: how its figures are computed, and that every architecture in it passed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from support.quantizing import Models
from support.served_page import page_table
from support.tiny_models import architecture_of, plan_of, recipe

from benchmarks.served.cells import Cell
from benchmarks.served.reference import relative_error
from benchmarks.served.table import table
from fp8pipe.hub.source import resolve
from fp8pipe.quantize import quantize
from fp8pipe.validate import validate


def test_the_error_ignores_what_softmax_ignores_and_nothing_else() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    assert relative_error(logits + 3, logits) < 1e-6
    assert relative_error(logits * 1.1, logits) == pytest.approx(0.1, rel=1e-4)


def test_no_cell_of_the_table_is_blank() -> None:
    passed = Cell(model="A", recipe="x", key="", verdict="passed", error=0.061, doubled_error=0.4, source_error=0.01)
    unserved = Cell(model="A", recipe="y", key="", verdict="unserved", message="ValueError: no kernel")
    failed = Cell(model="B", recipe="x", key="", verdict="failed", message="logits differ by 0.30")
    text = table([passed, unserved, failed], ["x", "y"])
    assert "| A | 0.010 | passed (0.06) | [1] |" in text
    assert "[1] `ValueError: no kernel`" in text
    assert "| B | not served | FAILED: logits differ by 0.30 | (not made yet) |" in text
    assert not re.search(r"\|[ \t]*\|", text)


def test_the_page_has_the_main_architectures_and_every_cell_passed() -> None:
    page = page_table("# Served by vLLM")
    assert page.keys() >= {
        *("Llama", "Llama, tied", "Mistral", "Qwen2", "Qwen3", "Qwen3-MoE", "Mixtral", "Gemma 3 text", "Phi-3", "OPT"),
        "DeepSeek-V2",
    }
    cells = [(model, name, cell) for model, row in page.items() for name, cell in row.items() if name != "unquantized"]
    assert [cell for cell in cells if not cell[2].startswith("passed (")] == []
    recipes = {"autofp8-dynamic", "autofp8-static", "fp8-block", "fp8-dynamic", "fp8-static", "fp8-static-kv"}
    assert {name for _, name, _ in cells} >= recipes


def test_an_output_head_of_another_name_is_validated_as_a_head(model_folder: Models, tmp_path: Path) -> None:
    source = resolve(str(model_folder("gpt-neox")))
    quantize(source, plan_of(source.path, recipe()), tmp_path / "out")
    assert validate(tmp_path / "out", source=source, architecture=architecture_of(source.path)).errors == ()
