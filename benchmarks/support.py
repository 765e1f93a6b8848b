"""The tests' own models and cases, where a benchmark measures the same things."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"


def of_the_tests(name: str) -> Any:  # Any: tests are no package
    """Module `name` of tests/support."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    return importlib.import_module(f"support.{name}")
