"""Fixtures of the validate room's tests: BF16 models, correct FP8 checkpoints of them, a cache for their records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import reference_checkpoints as reference
from support.malformed import Base, Model, quantize


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
        return folder if folder.exists() else quantize(shelf / model, folder, base)

    return make


@pytest.fixture
def architecture_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Architecture records are kept for the session: the child that makes them costs seconds."""
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path_factory.getbasetemp() / "architectures"))
