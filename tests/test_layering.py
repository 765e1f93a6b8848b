"""Rooms import downwards only, and a command that needs nothing heavy imports nothing heavy."""

import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import fp8pipe

PACKAGE = Path(fp8pipe.__file__).parent
HEAVY = ("torch", "transformers", "vllm", "lm_eval", "datasets", "prefect", "matplotlib", "scipy")


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


def test_help_and_config_errors_import_nothing_heavy():
    loaded = modules_after("import fp8pipe.cli, fp8pipe.config, fp8pipe.ui.sheets")
    assert not loaded & set(HEAVY), loaded & set(HEAVY)


def test_every_package_is_in_the_wheel():
    listed = set(tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = {str(path.parent.relative_to(PACKAGE.parent)).replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    assert present <= listed
