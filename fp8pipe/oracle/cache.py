"""Where the answers of the oracles are cached."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of architecture records, under $FP8PIPE_CACHE or ~/.cache/fp8pipe."""
    root = os.environ.get("FP8PIPE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "fp8pipe") / "architectures"
