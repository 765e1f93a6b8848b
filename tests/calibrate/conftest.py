"""Models that several files of this room calibrate; nothing is written into them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.calibration import make_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("calibrate-llama")
    make_model(folder, "llama")
    return folder
