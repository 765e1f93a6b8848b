"""Tiny models as a fixture. Use: `pytest_plugins = ["checkpoint_fixtures"]`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_folder("qwen3")`: a folder with that tiny model, made once. Tests must not write into it."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(name: str = "llama", **changes: Any) -> Path:
        key = (name, *sorted(changes.items()))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(name), name, **changes)
        return made[key]

    return get
