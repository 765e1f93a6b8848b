"""Imports without what is not needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*names: str) -> Iterator[None]:
    """While this lasts, the packages `names` look as if they were not installed, unless they are loaded already."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]  how the import system is told "there is none"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
