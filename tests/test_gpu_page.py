"""docs/gpu.md says what fp8pipe does and which kernels vLLM takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import TESTS
from support.gpu_page import PAGE, kernel_cases, kernels, machines, section

from benchmarks.estimate import estimate

ASK = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fp8pipe.oracle import vllm_probe
from support.vllm_world import on_devices
answer = Path(sys.argv[3])
vllm_probe.prepare(answer.with_name("store"))
answer.write_text(json.dumps(on_devices(json.loads(sys.argv[2]))))
"""


def test_what_is_said_of_each_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert section("machines") == machines(tmp_path / "bin", monkeypatch)


@pytest.mark.vllm
def test_vllm_takes_the_kernels_that_the_page_names(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    arguments = [str(TESTS), json.dumps(kernel_cases()), str(answer)]
    subprocess.run([sys.executable, "-c", ASK, *arguments], check=True, capture_output=True)
    assert section("kernels") == kernels(json.loads(answer.read_text()))


def test_tables_fit_80_columns() -> None:
    tables = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert [line for line in tables if len(line) > 80] == []
    assert len(tables) > 20


def test_the_estimate_is_what_its_script_prints() -> None:
    assert section("estimate").strip() == estimate().strip()
