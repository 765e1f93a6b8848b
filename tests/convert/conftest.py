"""Fixtures of the convert room's tests: unquantized models, which tests must not write into."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import reference_checkpoints as reference


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama in BF16."""
    return reference.llama(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer model with sparse experts in BF16."""
    return reference.moe(tmp_path_factory.mktemp("source") / "moe")
