"""The demo's base model, trained once for every test that asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8pipe.rehearsal.demo import model


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete model folder."""
    return model.build_base(tmp_path_factory.mktemp("demo-base") / "model")
