"""Dependencies point one way, and a command that needs nothing heavy imports nothing heavy."""

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
    # These can be imported only, or quickly only, in a worker that has prepared for vLLM; the test below reads theirs.
    skipped = ("__main__", "evaluate.engine", "evaluate.cpu.linear", "evaluate.cpu.experts")
    names = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "fp8pipe.") if not m.name.endswith(skipped)]
    imports = "\n".join(f"import {name}" for name in names)
    assert "prefect" not in modules_after(imports)


def test_no_room_but_the_command_line_names_flows_or_tasks():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        imports = [line.strip() for line in text.splitlines() if line.strip().startswith(("from ", "import "))]
        foreign = [line for line in imports if line.split()[1].split(".")[0] in {"flows", "tasks", "prefect"}]
        assert not foreign or path.name == "cli.py", f"{path}: {foreign}"


def test_help_and_config_errors_import_nothing_heavy():
    loaded = modules_after("import fp8pipe.cli, fp8pipe.config, fp8pipe.ui.sheets")
    assert not loaded & set(HEAVY), loaded & set(HEAVY)


def test_every_package_is_in_the_wheel():
    listed = set(tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = {str(path.parent.relative_to(PACKAGE.parent)).replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    assert present <= listed
