"""What the answers of transformers and vLLM depend on besides the models they are asked about: part of every cache key.

The code that asks them, the versions of the libraries that build models, this machine's device, and vLLM's settings in
the environment. Nothing here imports a library.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp8pipe.machine.device import detect
from fp8pipe.machine.engine_python import engine

_ROOT = Path(__file__).parents[1]
_CODE = ("oracle/*.py", "evaluate/environment.py", "evaluate/cpu_platform.py", "evaluate/cpu/*.py")
"""What runs in the children: probes and rules, and what prepares their process and supplies kernels on a CPU."""
_LIBRARIES = ("transformers", "torch", "compressed-tensors")
_SETTINGS = ("VLLM_", "CUDA_VISIBLE_DEVICES")
"""Beginnings of environment variables that decide what vLLM builds."""


def basis(vllm: str | None) -> list[Any]:  # Any: what JSON holds
    """It, as JSON. `vllm`: the version of the vLLM that is asked; None if there is none."""
    device = detect()
    settings = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}
    versions = {name: engine().version(name) for name in _LIBRARIES} | {"vllm": vllm}
    return [_code(), versions, [device.device_class, device.name], settings]


def code_files() -> Iterator[Path]:
    """The files whose content counts."""
    return (path for pattern in _CODE for path in sorted(_ROOT.glob(pattern)))


@functools.cache
def _code() -> str:
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()
