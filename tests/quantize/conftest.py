"""Fixtures of the quantize room's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.writers import Writers


@pytest.fixture(scope="session")
def writers() -> Iterator[Writers]:
    """One parent of killable runs for all tests: its imports take seconds."""
    with Writers() as parent:
        yield parent
