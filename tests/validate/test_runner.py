"""The runner drops faults that another check speaks for, and counts those that a report has no room for."""

from __future__ import annotations

import pytest
from support import reference_checkpoints as reference

from fp8pipe.records import Finding
from fp8pipe.validate.checks.check import Check, check
from fp8pipe.validate.faults import MAX_FINDINGS_PER_CHECK, Fault
from fp8pipe.validate.prepare import read_subject
from fp8pipe.validate.reading.place import FolderPlace
from fp8pipe.validate.runner import run
from fp8pipe.validate.subject import Subject


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = reference.llama(tmp_path_factory.mktemp("models") / "dense")
    return read_subject(FolderPlace(folder), None, None, oracles=False)


def finds(id: str, *faults: Fault, yields_to: tuple[str, ...] = ()) -> Check:
    """A check that finds these faults."""
    row = check(id, "a demand", yields_to=yields_to, consequence="none", remedy="none")
    return row(lambda _: faults)


def reported(findings: list[Finding]) -> list[tuple[str, str | None]]:
    return [(finding.check, finding.tensor or finding.file) for finding in findings]


WEIGHT, SCALE = Fault("a", "b", tensor="m.0.weight"), Fault("a", "b", tensor="m.0.weight_scale")


def test_fault_is_dropped_where_an_owner_has_one_on_the_same_tensor(subject: Subject) -> None:
    checks = [finds("X1", WEIGHT, SCALE, yields_to=("X2",)), finds("X2", WEIGHT)]
    assert reported(list(run(checks, subject))) == [("X1", "m.0.weight_scale"), ("X2", "m.0.weight")]


def test_fault_is_dropped_where_an_owner_claims_its_module(subject: Subject) -> None:
    owner = Fault("a", "b", tensor="m.0.weight", claims=("m.0",))
    other = Fault("a", "b", tensor="m.1.weight_scale")
    checks = [finds("X1", SCALE, other, yields_to=("X2",)), finds("X2", owner)]
    assert reported(list(run(checks, subject))) == [("X1", "m.1.weight_scale"), ("X2", "m.0.weight")]


def test_fault_of_a_file_or_of_a_key_is_dropped_where_an_owner_has_one_there(subject: Subject) -> None:
    of_key, of_other_key = (Fault("a", "b", file="config.json", key=key) for key in ("format", "ignore"))
    checks = [
        finds("X1", of_key, of_other_key, yields_to=("X3",)),
        finds("X2", Fault("a", "b", file="model.safetensors"), yields_to=("X3",)),
        finds("X3", of_key, Fault("a", "b", file="model.safetensors", tensor="m.0.weight")),
    ]
    assert [finding.check for finding in run(checks, subject)] == ["X1", "X3", "X3"]


def test_dropped_fault_speaks_for_nothing(subject: Subject) -> None:
    checks = [
        finds("X1", WEIGHT, yields_to=("X2",)),
        finds("X2", Fault("a", "b", tensor="m.1.weight", claims=("m.0",)), yields_to=("X3",)),
        finds("X3", Fault("a", "b", tensor="m.1.weight")),
    ]
    assert reported(list(run(checks, subject))) == [("X1", "m.0.weight"), ("X3", "m.1.weight")]


def test_fault_is_reported_when_its_owner_does_not_run(subject: Subject) -> None:
    assert reported(list(run([finds("X1", WEIGHT, yields_to=("X2",))], subject))) == [("X1", "m.0.weight")]


def test_faults_beyond_the_limit_are_counted_and_still_own_their_names(subject: Subject) -> None:
    faults = [Fault("a", "b", tensor=f"m.{number}.weight") for number in range(MAX_FINDINGS_PER_CHECK + 7)]
    findings = list(run([finds("X1", *faults), finds("X2", faults[-1], yields_to=("X1",))], subject))
    assert len(findings) == MAX_FINDINGS_PER_CHECK + 1
    assert findings[-1].found == "7 more findings of this check"
