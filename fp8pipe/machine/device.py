"""The device of this machine, its class, and whether vLLM can serve FP8 on it; found without importing torch."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fp8pipe.errors import NoSuitableDevice

_CLASSES = {
    (8, 0): "ampere",
    (8, 6): "ampere",
    (8, 9): "ada",
    (9, 0): "hopper",
    (10, 0): "blackwell",
    (12, 0): "blackwell",
}
"""CUDA compute capability -> name of the hardware class, as policies write it."""


@dataclass(frozen=True, slots=True)
class Device:
    """The device that evaluations run on."""

    device_class: str
    """hopper | ada | blackwell | ampere | sm<NN> | cpu"""
    name: str
    problem: str | None
    """Why vLLM cannot serve FP8 here, in one line; None if it can."""


def detect() -> Device:
    """The first NVIDIA GPU; the CPU if there is none."""
    return _gpu() or _cpu()


def require() -> Device:
    """The device. Raises NoSuitableDevice if vLLM cannot serve FP8 on it."""
    device = detect()
    if device.problem:
        raise NoSuitableDevice(device.problem)
    return device


def class_of_capability(major: int, minor: int) -> str:
    """Name of the hardware class of a CUDA compute capability: `ada`, `hopper`, ..., or `sm75` for an unnamed one."""
    return _CLASSES.get((major, minor), f"sm{major}{minor}")


def _gpu() -> Device | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = answer.stdout.strip().splitlines()
    if answer.returncode != 0 or not lines:
        return None
    name, capability = (part.strip() for part in lines[0].rsplit(",", 1))
    major, _, minor = capability.partition(".")
    version = (int(major), int(minor))
    problem = None
    if version < (8, 9):
        problem = f"{name} has compute capability {capability}; FP8 W8A8 needs 8.9 (Ada) or 9.0 (Hopper)"
    return Device(class_of_capability(*version), name, problem)


def _cpu() -> Device:
    system = f"{platform.system()} {platform.machine()}"
    if system != "Linux x86_64":
        return Device("cpu", system, f"fp8pipe runs on x86-64 Linux, found {system}")
    return cpu_of(Path("/proc/cpuinfo").read_text())


def cpu_of(info: str) -> Device:
    """The CPU that `info`, the content of /proc/cpuinfo, describes."""
    name = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "cpu")
    flags = next((line.split(":", 1)[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    if "avx512f" not in flags:
        return Device(
            "cpu", name, f"no NVIDIA GPU, and the CPU ({name}) lacks AVX-512, which vLLM's FP8 KV cache needs"
        )
    return Device("cpu", name, None)
