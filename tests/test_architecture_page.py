"""docs/architecture.md against the tree: its rooms, its arrows, and where it says that things are."""

from __future__ import annotations

import ast
import re

import grimp
import pytest
from support import ROOT

from fp8pipe.validate import all_checks

PAGE = (ROOT / "docs" / "architecture.md").read_text()
DIAGRAM = re.findall(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)[0]
TABLE = PAGE.partition("| behaviour | file | name |")[2].strip().splitlines()[1:]
WHERE = re.findall(r"^\| ([^|]+) \| `([^`|]+\.py)` \| `([\w.]+)` \|$", "\n".join(TABLE), re.MULTILINE)


def rooms() -> set[str]:
    folders = {path.parent.name for path in (ROOT / "fp8pipe").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "fp8pipe").glob("*.py") if path.stem != "__init__"}
    return {*folders, *files, "tasks", "flows"}


def definitions(path: str) -> set[str]:
    """Names of functions, classes, methods and constants of a file."""
    found: set[str] = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_the_diagram_shows_every_room() -> None:
    shown = set(re.findall(r"^\s*(\w+)\[", DIAGRAM, re.MULTILINE))
    assert shown == rooms()


def test_every_arrow_is_an_import() -> None:
    graph = grimp.build_graph("fp8pipe", "tasks", "flows")

    def modules(room: str) -> set[str]:
        package = room if room in {"tasks", "flows"} else f"fp8pipe.{room}"
        return {package, *graph.find_descendants(package)}

    arrows = re.findall(r"^\s*(\w+) --> (.+)$", DIAGRAM, re.MULTILINE)
    assert arrows
    for start, ends in arrows:
        for end in ends.split(" & "):
            imported = {name for module in modules(start) for name in graph.find_modules_directly_imported_by(module)}
            assert imported & modules(end.strip()), f"{start} imports nothing of {end}"


@pytest.mark.parametrize(("behaviour", "path", "name"), WHERE, ids=[row[0].strip() for row in WHERE])
def test_a_behaviour_is_where_the_page_says(behaviour: str, path: str, name: str) -> None:
    assert name in definitions(path), f"{path} has no {name}: where is {behaviour!r} now?"


def test_every_row_of_the_table_is_compared_with_the_tree() -> None:
    assert len(WHERE) == len(TABLE) >= 30


def test_the_diagram_counts_the_checks() -> None:
    assert f"{len(all_checks())} checks" in DIAGRAM
