"""Where a checkpoint folder keeps its records."""

from __future__ import annotations

from pathlib import Path

from fp8pipe.records.base import RECORD_DIR

RECORD_FILES = {
    "source": "source.json",
    "source_config": "source_config.json",
    "source_card": "source_card.md",
    "terms": "terms.json",
    "published": "published.json",
    "plan": "plan.json",
    "calibration": "calibration.json",
    "checkpoint": "checkpoint.json",
    "conversion": "conversion.json",
    "validation": "validation.json",
    "policy": "policy.json",
    "suite": "suite.json",
    "baseline": "baseline.json.gz",
    "candidate": "candidate.json.gz",
    "gate": "gate.json",
    "approval": "approval.json",
    "card_template": "card_template.md.j2",
    "provenance": "provenance.json",
    "recipe": "recipe.yaml",
    "environment": "environment.json",
    "manifest": "manifest.json",
}
"""Files in DIR/fp8pipe/, written by the stages and published with the checkpoint."""

PLOTS = ("drop", "accuracy", "flips", "modules", "sensitivity")
"""Names of the pictures in DIR/fp8pipe/plots/, each as PNG and as SVG."""


def record_path(folder: Path, name: str) -> Path:
    """Path of the record called `name` (a key of RECORD_FILES) of a checkpoint folder."""
    return folder / RECORD_DIR / RECORD_FILES[name]
