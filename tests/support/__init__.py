"""What several test files use: models, checkpoints, reports, reference formulas. No tests."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
"""For child processes, which find `support` through it."""
ROOT = TESTS.parent
DATA = TESTS / "data"
