"""Where a checkpoint folder keeps its records."""

from __future__ import annotations

from pathlib import Path

from fp8pipe.records.base import RECORD_DIR

EVIDENCE = {
    "source": "source.json",
    "plan": "plan.json",
    "calibration": "calibration.json",
    "checkpoint": "checkpoint.json",
    "validation": "validation.json",
    "policy": "policy.json",
    "baseline": "baseline.json",
    "candidate": "candidate.json",
    "gate": "gate.json",
}
"""Files in DIR/fp8pipe/, written by the stages, published with the checkpoint."""


def evidence(folder: Path, name: str) -> Path:
    """Where a checkpoint folder keeps the record called `name`."""
    return folder / RECORD_DIR / EVIDENCE[name]
