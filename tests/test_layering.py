"""Rooms import downwards only, and a command that needs nothing heavy imports nothing heavy."""

import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fp8pipe

PACKAGE = Path(fp8pipe.__file__).parent
HEAVY = {"torch", "transformers", "vllm", "lm_eval", "datasets", "prefect", "matplotlib", "scipy", "numba", "pyarrow"}


def modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


def test_importing_every_room_brings_in_no_prefect():
    # These need a process that has been prepared for vLLM; `lint-imports` covers them too.
    skipped = ("__main__", "evaluate.engine", "evaluate.cpu.linear", "evaluate.cpu.experts")
    names = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "fp8pipe.") if not m.name.endswith(skipped)]
    imports = "\n".join(f"import {name}" for name in names)
    assert "prefect" not in modules_after(imports)


def test_rooms_import_as_pyproject_allows():
    lint = Path(sys.executable).with_name("lint-imports")
    answer = subprocess.run([lint], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize("command", ["--help", "release --help", "plan some/model --recipe no-such-recipe"])
def test_help_and_config_errors_import_nothing_heavy(command: str):
    run = f"import sys; sys.argv = ['fp8pipe', *{command.split()!r}]\nfrom fp8pipe.cli import main\n"
    loaded = modules_after(f"{run}try: main()\nexcept SystemExit as end: print('exit', end.code)")
    assert "exit" in loaded
    assert not loaded & HEAVY


def test_the_wheel_lists_every_package():
    listed = set(tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = [PACKAGE, *(PACKAGE.parent / name for name in ("flows", "tasks"))]
    found = (path.parent for folder in folders for path in folder.rglob("__init__.py"))
    packages = {str(folder.relative_to(PACKAGE.parent)).replace("/", ".") for folder in found}
    assert packages | {"fp8pipe.configs"} == listed  # configs/ lies beside the package in a checkout
