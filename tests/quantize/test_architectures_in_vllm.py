"""The four most different architectures, quantized, in real vLLM: the source's logits, but not with a doubled scale."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from support import ROOT
from support.tiny_models import architecture_of, make_model, plan_of, recipe

from benchmarks.architectures.cells import LIMIT, Cell, make_cells, shipped_recipes
from benchmarks.architectures.reference import relative_error
from benchmarks.architectures.table import table
from fp8pipe.hub.source import resolve
from fp8pipe.quantize import quantize
from fp8pipe.validate import validate

SERVED = {
    ("Llama, tied", "fp8-static-kv"): "dense, one embedding for both ends, FP8 KV cache",
    ("Phi-3", "autofp8-dynamic"): "q, k and v, gate and up in one tensor on disk",
    ("Mixtral", "fp8-dynamic"): "sparse experts",
    ("Mixtral", "fp8-block"): "sparse experts in blocks",
    ("DeepSeek-V2", "fp8-dynamic"): "latent attention, shared experts, a first dense layer",
}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Cell]:
    """All of SERVED, through one vLLM process."""
    work = tmp_path_factory.mktemp("architectures")
    recipes = {recipe.name: recipe for recipe in shipped_recipes(work)}
    wanted = [(model, recipes[name]) for model, name in SERVED]
    return {(cell.model, cell.recipe): cell for cell in make_cells(wanted, work, print)}


@pytest.mark.vllm
@pytest.mark.parametrize("place", SERVED, ids=" ".join)
def test_logits_are_the_sources_and_the_check_sees_a_doubled_scale(
    cells: dict[tuple[str, str], Cell], place: tuple[str, str]
):
    cell = cells[place]
    assert (cell.verdict, cell.message) == ("passed", "")
    assert cell.source_error is not None and cell.error is not None and cell.doubled_error is not None
    assert cell.source_error < cell.error <= LIMIT < cell.doubled_error
    assert cell.tokens >= 0.8 * cell.of_tokens


@pytest.mark.vllm
def test_every_tensor_on_disk_has_its_place_in_vllms_model(cells: dict[tuple[str, str], Cell]):
    told = page_table("Names, dtypes and shapes")
    assert {place: f"{cell.tensors}/{cell.parameters}" for place, cell in cells.items()} == {
        (model, name): told[model][name] for model, name in SERVED
    }
    sparse = cells["Mixtral", "fp8-dynamic"]
    assert sparse.tensors > 1.5 * sparse.parameters  # one tensor per expert on disk, one for all of them in vLLM


def test_error_is_blind_to_what_softmax_does_not_see_and_to_nothing_else():
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    assert relative_error(logits + 3, logits) < 1e-6
    assert relative_error(logits * 1.1, logits) == pytest.approx(0.1, rel=1e-4)


def test_no_cell_of_the_table_is_blank():
    passed = Cell(model="A", recipe="x", key="", verdict="passed", error=0.061, doubled_error=0.4, source_error=0.01)
    unserved = Cell(model="A", recipe="y", key="", verdict="unserved", message="ValueError: no kernel")
    failed = Cell(model="B", recipe="x", key="", verdict="failed", message="logits differ by 0.30")
    text = table([passed, unserved, failed], ["x", "y"])
    assert "| A | 0.010 | passed (0.06) | [1] |" in text
    assert "[1] `ValueError: no kernel`" in text
    assert "| B | not served | FAILED: logits differ by 0.30 | (not made yet) |" in text
    assert not re.search(r"\|[ \t]*\|", text)


def test_an_output_head_of_another_name_is_a_head(tmp_path: Path):
    source = resolve(str(make_model(tmp_path / "source", "gpt-neox")))
    quantize(source, plan_of(source.path, recipe("fp8-dynamic")), tmp_path / "out")
    assert validate(tmp_path / "out", source=source, architecture=architecture_of(source.path)).errors == ()


def page_table(heading: str) -> dict[str, dict[str, str]]:
    """Row -> column -> cell of the first table behind `heading` on the page."""
    lines = (ROOT / "docs" / "architectures.md").read_text().partition(heading)[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    columns, _, *body = rows
    ends = next((i for i, row in enumerate(body) if row[0] == columns[0]), len(body))  # the next table
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in body[:ends]}


def test_page_holds_every_row_of_the_brief_and_every_cell_passed():
    page = page_table("# Architectures")
    assert page.keys() >= {
        *("Llama", "Llama, tied", "Mistral", "Qwen2", "Qwen3", "Qwen3-MoE", "Mixtral", "Gemma 3 text", "Phi-3", "OPT"),
        "DeepSeek-V2",
    }
    cells = [(model, name, cell) for model, row in page.items() for name, cell in row.items() if name != "unquantized"]
    assert [cell for cell in cells if not cell[2].startswith("passed (")] == []
    assert {name for _, name, _ in cells} >= {name for _, name in SERVED}
