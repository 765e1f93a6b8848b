"""The file, .npz, that passes logits and chosen experts from one process to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def save_answers(path: Path, logits: np.ndarray, routing: np.ndarray | None) -> None:
    """Save logits [positions, vocabulary] float32 and routing [positions, layers, top_k], None without experts."""
    arrays: dict[str, Any] = {"logits": logits} | ({} if routing is None else {"routing": routing})
    np.savez(path, **arrays)


def load_answers(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits and routing as `save_answers` wrote them."""
    with np.load(path) as stored:
        return stored["logits"], stored.get("routing")
