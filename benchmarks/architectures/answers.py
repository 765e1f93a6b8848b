"""Logits and chosen experts between processes: one .npz file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def save_answers(path: Path, logits: np.ndarray, routing: np.ndarray | None) -> None:
    """logits [positions, vocabulary] float32; routing [positions, layers, top_k], None without sparse experts."""
    arrays: dict[str, Any] = {"logits": logits} | ({} if routing is None else {"routing": routing})
    np.savez(path, **arrays)


def load_answers(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """What `save_answers` wrote."""
    with np.load(path) as stored:
        return stored["logits"], stored.get("routing")
