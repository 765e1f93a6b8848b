"""No configuration is dead: every field that people can write is read by something.

pyright is the judge, since it knows types where names repeat: in a copy of the sources each field of the config classes
is a property that is marked as deprecated, and pyright reports every read. Reads in validators, which only check what
was written, do not count.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support import ROOT

from fp8pipe import config
from fp8pipe.config import Config

UNION = {"TaskPolicy": "PerplexityPolicy"}
"""Both stand for a limit in one union, of which pyright reports the second."""
VALIDATORS = {"model_validator", "field_validator"}
READ = re.compile(r"read: (\w+)\.(\w+)")


def config_classes() -> dict[str, type[Config]]:
    found = {name: kind for name, kind in vars(config).items() if isinstance(kind, type) and issubclass(kind, Config)}
    return {name: kind for name, kind in found.items() if kind is not Config}


def marked(source: str, classes: dict[str, type[Config]]) -> str:
    """The source with each field of `classes` as a property whose reads pyright reports as `read: Class.field`."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for field in (part for part in node.body if isinstance(part, ast.AnnAssign)):
                name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
                mark = f'    @property\n    @__import__("typing_extensions").deprecated("read: {node.name}.{name}")'
                lines[field.lineno - 1] = f"{mark}\n    def {name}(self) -> {kind}: ..."
                lines[field.lineno : field.end_lineno] = [""] * ((field.end_lineno or field.lineno) - field.lineno)
    text = "\n".join(lines).replace('__import__("typing_extensions").deprecated', "_deprecated")
    return text.replace("annotations\n", "annotations\nfrom typing_extensions import deprecated as _deprecated\n", 1)


def validator_lines(path: Path) -> set[int]:
    """Lines of methods that only check what was written."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            decorators = {ast.unparse(one).partition("(")[0] for one in node.decorator_list}
            if decorators & VALIDATORS:
                lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def reads(copy: Path) -> Iterator[tuple[str, str]]:
    """(class, field) of every read in `copy`."""
    command = [str(Path(sys.executable).with_name("pyright")), "--outputjson", "--pythonpath", sys.executable]
    answer = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    found = [one for one in json.loads(answer.stdout)["generalDiagnostics"] if READ.search(one["message"])]
    skipped = {one["file"]: validator_lines(Path(one["file"])) for one in found}
    for one in found:
        if one["range"]["start"]["line"] + 1 not in skipped[one["file"]]:
            yield from READ.findall(one["message"])


def test_every_field_of_every_config_class_is_read(tmp_path: Path) -> None:
    classes = config_classes()
    for room in ("fp8pipe", "flows", "tasks"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    settings = {"include": ["fp8pipe", "flows", "tasks"], "reportDeprecated": "error"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    for path in (tmp_path / "fp8pipe" / "config").glob("*.py"):
        path.write_text(marked(path.read_text(), classes))
    read = set(reads(tmp_path))
    unread = [
        f"{name}.{field}"
        for name, kind in classes.items()
        for field in kind.model_fields
        if (name, field) not in read and (UNION.get(name), field) not in read and field in kind.__annotations__
    ]
    assert not unread, f"nothing reads {', '.join(unread)}: remove them, or make them work"
