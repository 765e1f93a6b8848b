"""Real vLLM serves the most different architectures with the source's logits, and a doubled scale is noticed."""

from __future__ import annotations

import pytest
from support.machine import require_fp8_kv_cache
from support.served_page import page_table

from benchmarks.served.cells import LIMIT, Cell, make_cells, shipped_recipes

pytestmark = pytest.mark.vllm

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


@pytest.mark.parametrize("place", SERVED, ids=" ".join)
def test_logits_are_the_sources_and_the_check_sees_a_doubled_scale(
    cells: dict[tuple[str, str], Cell], place: tuple[str, str]
) -> None:
    if place[1].endswith("-kv"):
        require_fp8_kv_cache()
    cell = cells[place]
    assert (cell.verdict, cell.message) == ("passed", "")
    assert cell.source_error is not None and cell.error is not None and cell.doubled_error is not None
    assert cell.source_error < cell.error <= LIMIT < cell.doubled_error
    assert cell.tokens >= 0.8 * cell.of_tokens


def test_every_tensor_on_disk_has_a_place_in_vllms_model(cells: dict[tuple[str, str], Cell]) -> None:
    page = page_table("Names, dtypes and shapes")
    assert {place: f"{cell.tensors}/{cell.parameters}" for place, cell in cells.items()} == {
        (model, name): page[model][name] for model, name in SERVED
    }
    sparse = cells["Mixtral", "fp8-dynamic"]
    assert sparse.tensors > 1.5 * sparse.parameters  # one tensor per expert on disk, one for all of them in vLLM
