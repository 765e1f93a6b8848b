"""The table of checks: complete, in order, in the file of its letter; owners of overlapping faults are in it."""

from __future__ import annotations

import inspect
from pathlib import Path

from fp8pipe.validate import all_checks
from fp8pipe.validate.checks.check import Check
from fp8pipe.validate.registry import header_checks

FAMILIES = "FCKSVDLPR"


def test_checks_are_numbered_without_gaps_in_the_order_of_their_families() -> None:
    ids = [check.id for check in all_checks()]
    counts = {letter: sum(name[0] == letter for name in ids) for letter in FAMILIES}
    assert ids == [f"{letter}{number}" for letter in FAMILIES for number in range(1, counts[letter] + 1)]
    assert len(ids) == 68


def test_letter_of_an_id_is_the_file_of_its_check() -> None:
    for check in all_checks():
        assert Path(inspect.getfile(check.run)).name[0].upper() == check.id[0]


def test_every_check_of_a_family_file_is_in_the_table() -> None:
    modules = {inspect.getmodule(check.run) for check in all_checks()}
    written = {value for module in modules for value in vars(module).values() if isinstance(value, Check)}
    assert {check.id for check in written} == {check.id for check in all_checks()}


def test_header_checks_are_all_that_read_headers_only() -> None:
    assert {c.id for c in all_checks() if c.depth == "headers"} <= {c.id for c in header_checks()}


def test_checks_yield_to_checks_of_the_table_and_never_in_a_circle() -> None:
    yields_to = {check.id: set(check.yields_to) for check in all_checks()}
    while yields_to:
        last = {name for name, owners in yields_to.items() if not owners}
        assert last, f"a circle, or an unknown check, among {yields_to}"
        yields_to = {name: owners - last for name, owners in yields_to.items() if name not in last}
