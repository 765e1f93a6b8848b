"""Where answers of the oracles are kept: under $FP8PIPE_CACHE or ~/.cache/fp8pipe, a folder for each kind of answer."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from fp8pipe.errors import EnvironmentFault
from fp8pipe.files import write_atomically


def cache_dir(kind: str = "architectures") -> Path:
    """Folder of one kind of answers."""
    root = os.environ.get("FP8PIPE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "fp8pipe") / kind


def known(kind: str, key: str) -> Any:  # Any: what JSON holds
    """The answer that was kept under `key`; None if there is none, or none that can be read."""
    try:
        return json.loads((cache_dir(kind) / f"{key}.json").read_bytes())
    except (OSError, ValueError):
        return None


def keep(kind: str, key: str, answer: Any) -> None:
    """Keep an answer that JSON can hold. Writers do not get in each other's way: the last one wins, whole."""
    with contextlib.suppress(EnvironmentFault):  # a cache that cannot be written costs seconds, not the answer
        write_atomically(cache_dir(kind) / f"{key}.json", json.dumps(answer).encode())
