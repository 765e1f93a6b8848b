"""The benchmark of the engine: its command runs through, and its page holds what was measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from benchmarks.page import put, table
from benchmarks.quantize import SCHEMES, Timing, report


def test_a_section_is_replaced_and_its_neighbours_stay(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    put(page, "One", "alpha")
    put(page, "Two", "beta")
    put(page, "One", "gamma")
    text = page.read_text()
    assert text.startswith("# ")
    assert text.index("## One") < text.index("gamma") < text.index("## Two") < text.index("beta")
    assert "alpha" not in text and text.count("## One") == 1
    before = text
    put(page, "Two", "beta")
    assert page.read_text() == before


def test_ratios_are_taken_within_a_round() -> None:
    fast = {"copy": 4.0, "floor": 1.0, "ours": 2.0, "peer": 10.0, "warm": 4.0, "cold": 10.0}
    rounds = [{name: Timing(whole=2 * s * f, inside=s * f) for name, s in fast.items()} for f in (1.0, 3.0)]
    text = report({SCHEMES[0]: rounds}, 10**9, 2)
    assert "| inside / floor, all cores | 2.00 (2.00 to 2.00) | at most 2.0 |" in text
    assert "| inside / floor, one thread | 0.50 (0.50 to 0.50) | at most 2.0 |" in text
    assert "| peer inside / inside | 5.00 (5.00 to 5.00) | at least 5 |" in text
    assert "| peer whole / whole, cold | 1.00 (1.00 to 1.00) | at least 1.7 |" in text
    assert "| peer whole / whole, with record | 2.50 (2.50 to 2.50) | at least 4 |" in text
    assert "2.00 (1.00 to 3.00)" in text  # the floor's seconds: median, smallest, largest


def test_without_the_peer_no_row_speaks_of_it() -> None:
    rounds = [{name: Timing(1.0, 1.0) for name in ("copy", "floor", "ours", "warm", "cold")}]
    assert "| peer" not in report({SCHEMES[0]: rounds}, 10**9, 1)


def test_a_table_has_a_row_for_each_line() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


@pytest.mark.long
def test_the_quick_benchmark_runs_through(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks.quantize", "--quick", "--rounds", "1", "--no-peer"]
    command += ["--scheme", "fp8-dynamic", "--folder", str(tmp_path), "--page", str(page)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ, capture_output=True)
    assert "inside / floor" in page.read_text() and "8.6 GB tensors" in page.read_text()
    assert list(tmp_path.iterdir()) == [page]
