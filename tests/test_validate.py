"""The validator: silent on correct checkpoints, one voice for each corruption, calm before garbage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import reference_checkpoints as reference
from malformed import ALL, BASES, CASES, Base, Case, Model

from fp8pipe.records import ValidationReport
from fp8pipe.source import resolve
from fp8pipe.validate import validate

OWN_WARNINGS: dict[Base, set[str]] = {"fp8": {"C9"}}
"""Warnings that are true of the correct checkpoint."""


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three BF16 models."""
    root = tmp_path_factory.mktemp("models")
    reference.llama(root / "dense")
    reference.llama(root / "tied", tied=True)
    reference.moe(root / "moe")
    return root


@pytest.fixture(scope="session")
def checkpoint(shelf: Path) -> Callable[[Model, Base], Path]:
    """A correct FP8 checkpoint, made once and not to be altered."""

    def make(model: Model, base: Base) -> Path:
        folder = shelf / f"{model}-{base}"
        return folder if folder.exists() else reference.quantize(shelf / model, folder, **BASES[base])

    return make


@pytest.fixture(autouse=True)
def architecture_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Architecture records are kept for the session: the child that makes them costs seconds."""
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path_factory.getbasetemp() / "architectures"))


def ids(report: ValidationReport) -> set[str]:
    return {finding.check for finding in report.findings}


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("base", BASES)
def test_correct_checkpoint_has_no_finding_at_any_depth(
    shelf: Path, checkpoint: Callable[[Model, Base], Path], model: Model, base: Base
) -> None:
    folder = checkpoint(model, base)
    for report in (
        validate(folder, depth="headers"),
        validate(folder),
        validate(folder, source=resolve(str(shelf / model))),
    ):
        assert ids(report) == OWN_WARNINGS.get(base, set()), [f.sentence() for f in report.findings]
        assert report.sound


@pytest.mark.parametrize(
    ("case", "model"),
    [(case, model) for case in CASES for model in case.models],
    ids=lambda value: f"{value.number}-{value.name}" if isinstance(value, Case) else value,
)
def test_corruption_brings_its_own_findings_and_no_others(
    shelf: Path, checkpoint: Callable[[Model, Base], Path], tmp_path: Path, case: Case, model: Model
) -> None:
    folder = reference.copy(checkpoint(model, case.base), tmp_path / "checkpoint")
    (tmp_path / "source").write_text(str(shelf / model))
    case.spoil(folder)
    report = validate(folder, source=resolve((tmp_path / "source").read_text()))
    found = ids(report) - OWN_WARNINGS.get(case.base, set())
    assert found == case.findings, "\n".join(f.sentence() for f in report.findings)
    assert all(finding.remedy and finding.consequence for finding in report.findings)
