"""The comparison of two versions: what counts as the same, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.same_bytes import Outcome, judged, shipped_recipes

FILES = {"config.json": "1", "model.safetensors": "2", "fingerprint": "3"}
MADE = Outcome(0, FILES, "")


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        (MADE, "same"),
        (Outcome(0, FILES | {"model.safetensors": "9", "fingerprint": "9"}, ""), "DIFFERENT: fingerprint, model.safe"),
        (Outcome(0, FILES | {"extra.json": "4"}, ""), "DIFFERENT: extra.json"),
        (Outcome(2, {}, "refused"), "DIFFERENT: exit code 0 here, 2 there"),
    ],
)
def test_any_other_byte_file_or_exit_code_is_a_difference(theirs: Outcome, verdict: str) -> None:
    assert judged(MADE, theirs).startswith(verdict)


def test_two_refusals_are_the_same_but_two_crashes_are_a_failure() -> None:
    assert judged(Outcome(2, {}, "one reason"), Outcome(2, {}, "another wording")).startswith("same: both refuse")
    assert judged(Outcome(5, {}, "crash"), Outcome(5, {}, "crash")).startswith("FAILED")


def test_recipes_of_either_version_are_compared(tmp_path: Path) -> None:
    for version, name in (("one", "fp8-old"), ("two", "fp8-new")):
        (tmp_path / version / "configs" / "recipes").mkdir(parents=True)
        (tmp_path / version / "configs" / "recipes" / f"{name}.yaml").touch()
    assert shipped_recipes((tmp_path / "one", tmp_path / "two")) == ["fp8-new", "fp8-old"]
