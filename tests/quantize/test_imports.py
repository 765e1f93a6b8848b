"""What a run loads: its imports take longer than a small model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.quantizing import SCHEMES, Models
from support.tiny_models import plan_of, recipe

from fp8pipe.hub.source import resolve

CHILD = """
import gc, sys
from pathlib import Path
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Snapshot

folder = Path(sys.argv[1])
quantize(Snapshot.load(folder / "snapshot.json"), Plan.load(folder / "plan.json"), folder / "out")
assert gc.isenabled()
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("scheme", ["channel", "tensor", "block", "block mse"])
def test_torch_is_loaded_for_the_mse_observer_alone(model_folder: Models, tmp_path: Path, scheme: str) -> None:
    source = model_folder("llama", head_dim=64, intermediate_size=384)
    resolve(str(source)).save(tmp_path / "snapshot.json")
    plan_of(source, recipe(**SCHEMES[scheme])).save(tmp_path / "plan.json")
    answer = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == str("mse" in scheme)
