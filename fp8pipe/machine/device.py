"""The device that models are served on here, and whether it can serve FP8: one answer for `doctor`, for a release, for
an evaluation and for the process of an engine. Found without importing torch or vLLM."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp8pipe.errors import NoSuitableDevice
from fp8pipe.machine import builds
from fp8pipe.machine.engine_python import Environment, engine, own
from fp8pipe.machine.fit import Need, too_busy, too_large
from fp8pipe.machine.gpus import Gpu, driver, installed, selected, visible

_CLASSES = {
    (8, 0): "ampere",
    (8, 6): "ampere",
    (8, 9): "ada",
    (9, 0): "hopper",
    (10, 0): "blackwell",
    (10, 3): "blackwell",
    (12, 0): "blackwell",
    (12, 1): "blackwell",
}
"""CUDA compute capability -> name of the hardware class, as policies write it."""

_W8A8 = (8, 9)
_DRIVERS = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA -> the first driver branch that runs it (CUDA's release notes: minor version compatibility)."""


@dataclass(frozen=True, slots=True)
class Device:
    """The device that evaluations run on."""

    device_class: str
    """hopper | ada | blackwell | ampere | sm<NN> | cpu"""
    name: str
    gpus: tuple[Gpu, ...] = ()
    """All that this process may use, the first of which has the class and name; () on a CPU."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The device, and what stands in its way. Each sentence says what is wrong and what to do."""

    device: Device
    problems: tuple[str, ...]
    """Why vLLM cannot serve FP8 here; () if it can."""
    warnings: tuple[str, ...]
    """What works otherwise than it might, or may not work later."""


def detect() -> Device:
    """The first GPU that this process may use; the CPU if there is none or vLLM is a CPU build.

    Raises NoSuitableDevice if nvidia-smi fails.
    """
    gpus = () if builds.vllm_device() == "cpu" else visible()
    return _gpu(gpus) if gpus else _cpu()


def require(needs: Sequence[Need] | None = None, *, starts: bool = False) -> Machine:
    """The machine. Raises NoSuitableDevice, with all that stands in its way, if vLLM cannot serve FP8 on it."""
    machine = examine(needs, starts=starts)
    if machine.problems:
        raise NoSuitableDevice("; ".join(machine.problems))
    return machine


def examine(needs: Sequence[Need] | None = None, *, starts: bool = False) -> Machine:
    """The machine as an engine that this process starts would find it.

    needs: the models to be served, each alone; () if they are not known yet, None for whatever fp8pipe can serve.
    starts: an engine is about to start, so that GPUs which others use are a problem; before that they are a warning,
    since others may end.
    """
    cached = needs is None or any(need.fp8_cache for need in needs)
    try:
        everything = installed()
    except NoSuitableDevice as error:
        broken = (str(error),)
        return Machine(_cpu(), broken, ()) if _built_for_gpus() else Machine(_cpu(), _cpu_problems(cached), broken)
    gpus = selected(everything, setting := os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not gpus:
        hidden = f"CUDA_VISIBLE_DEVICES={setting!r} leaves none of {len(everything)} devices" if everything else ""
        return Machine(_cpu(), _without_gpu(hidden, cached), ())
    device = _gpu(gpus)
    if unusable := _torch_cannot(engine()) or _vllm_cannot():
        return Machine(device, (unusable,), ())
    problems = [*_unfit(gpus, everything), *filter(None, (too_large(need, gpus) for need in needs or ()))]
    warnings = list(_flashinfer(device))
    busy = [
        # An engine's process sees the GPUs that were chosen for it; before that, any that are free will do.
        too_busy(gpus[: need.all_gpus] if starts else gpus, need.all_gpus, need.utilization)
        for need in needs or ()
    ] or [too_busy(gpus)]
    (problems if starts else warnings).extend(dict.fromkeys(filter(None, busy)))
    return Machine(device, tuple(problems), tuple(warnings))


def unusable_by_torch() -> str | None:
    """Why this environment's torch cannot use the GPUs that the process may use; None if it can, or there are none.

    Torch itself only warns, and uses the CPU. Raises NoSuitableDevice if nvidia-smi fails.
    """
    return _torch_cannot(own()) if visible() else None


_EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
"""Of the CPU: by these torch and vLLM choose their kernels."""


def particulars() -> dict[str, str]:
    """This process's Python, system, and the CPU or the GPU's driver and CUDA: what a measurement may depend on beside
    the versions of libraries. Raises NoSuitableDevice if nvidia-smi fails."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    if detect().gpus:
        version, newest = driver()
        built = builds.torch_cuda(own())
        return found | {"driver": version, "driver_cuda": _dotted(newest), "torch_cuda": _dotted(built)}
    info = "" if _foreign_system() else Path("/proc/cpuinfo").read_text()
    return found | {"cpu": _cpu().name, "cpu_extensions": " ".join(sorted(_flags(info).intersection(_EXTENSIONS)))}


def _dotted(version: tuple[int, int] | None) -> str:
    return "unknown" if version is None else f"{version[0]}.{version[1]}"


def class_of_capability(major: int, minor: int) -> str:
    """Name of the hardware class of a CUDA compute capability: `ada`, `hopper`, ..., or `sm75` for an unnamed one."""
    return _CLASSES.get((major, minor), f"sm{major}{minor}")


_INSTALL = "install the GPU profile (`scripts/setup gpu .venv`), or set CUDA_VISIBLE_DEVICES to nothing to use the CPU"


def _torch_cannot(environment: Environment) -> str | None:
    built = builds.torch_cuda(environment)
    if built is None:
        return f"this host has GPUs, and torch is a CPU build; {_INSTALL}"
    version, newest = driver()
    if newest is None or newest[0] >= built[0]:
        return None
    wanted = f"to {_DRIVERS[built[0]]} or newer" if built[0] in _DRIVERS else f"to one for CUDA {built[0]}"
    return (
        f"NVIDIA driver {version} runs CUDA up to {newest[0]}.{newest[1]}, and torch was built for CUDA "
        f"{built[0]}.{built[1]}; update the driver {wanted}, or install torch and vLLM built for CUDA {newest[0]}"
    )


def _vllm_cannot() -> str | None:
    return f"this host has GPUs, and vLLM is a CPU build; {_INSTALL}" if builds.vllm_device() == "cpu" else None


def _built_for_gpus() -> bool:
    return builds.torch_cuda(engine()) is not None or builds.vllm_device() == "cuda"


def _gpu(gpus: tuple[Gpu, ...]) -> Device:
    return Device(class_of_capability(*gpus[0].capability), gpus[0].name, gpus)


def _without_gpu(hidden: str, cached: bool) -> tuple[str, ...]:
    """Problems of a process that may use no GPU. hidden: what hides them all; empty if there are none."""
    if builds.vllm_device() != "cuda":
        return _cpu_problems(cached)
    if hidden:
        return (f"{hidden}, and vLLM was built for GPUs; name one",)
    return (
        "nvidia-smi finds no GPU, and vLLM was built for GPUs; use a host with one, or install the CPU profile "
        "(`scripts/setup cpu .venv`)",
    )


def _unfit(gpus: Sequence[Gpu], everything: Sequence[Gpu]) -> Iterator[str]:
    """Problems of GPUs that torch and vLLM can use."""
    for gpu in {gpu.capability: gpu for gpu in gpus}.values():
        if gpu.capability == (0, 0):
            yield f"{gpu.name} does not tell its compute capability; update the NVIDIA driver"
        elif gpu.capability < _W8A8:
            yield (
                f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, and FP8 W8A8 needs 8.9 "
                "(Ada), 9.0 (Hopper) or newer; use such a GPU"
            )
    setting = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    by_number = any(entry.strip().isdecimal() for entry in setting.split(","))
    if len({gpu.name for gpu in everything}) > 1 and by_number and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        yield (
            "this host has different GPUs, which CUDA numbers otherwise than nvidia-smi; set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )


def _flashinfer(device: Device) -> Iterator[str]:
    """vLLM takes FlashInfer's kernels first on Blackwell, and on Ada for an FP8 KV cache. This host compiles them,
    unless `flashinfer-jit-cache` holds them. Without nvcc vLLM goes without them; with the package `flashinfer-cubin`
    it does not notice before it needs one."""
    if device.device_class not in ("ada", "blackwell") or builds.vllm_device() != "cuda":
        return
    if builds.has_package("flashinfer_jit_cache") or builds.compiler():
        return
    what = "Blackwell" if device.device_class == "blackwell" else "Ada with an FP8 KV cache"
    then = "stops when it needs one" if builds.has_package("flashinfer_cubin") else "takes slower Triton kernels"
    yield (
        f"vLLM serves {what} by FlashInfer, whose kernels nvcc and ninja compile, and they are not found; vLLM {then}: "
        "install the CUDA toolkit and ninja and set CUDA_HOME, or install flashinfer-jit-cache"
    )


def _cpu() -> Device:
    system = f"{platform.system()} {platform.machine()}"
    return Device("cpu", system if _foreign_system() else cpu_name(Path("/proc/cpuinfo").read_text()))


def _cpu_problems(cached: bool) -> tuple[str, ...]:
    """cached: with an FP8 KV cache."""
    problem = _foreign_system() or (cpu_problem(Path("/proc/cpuinfo").read_text()) if cached else None)
    return (problem,) if problem else ()


def _foreign_system() -> str | None:
    system = f"{platform.system()} {platform.machine()}"
    return None if system == "Linux x86_64" else f"fp8pipe runs on x86-64 Linux, found {system}"


def cpu_name(info: str) -> str:
    """Model of the CPU that `info`, the content of /proc/cpuinfo, describes."""
    return next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "cpu")


def cpu_problem(info: str) -> str | None:
    """Why vLLM cannot serve FP8 on that CPU; None if it can."""
    if "avx512f" in _flags(info):
        return None
    return (
        f"no NVIDIA GPU, and the CPU ({cpu_name(info)}) lacks AVX-512, which vLLM's FP8 KV cache needs; use another "
        "machine"
    )


def _flags(info: str) -> set[str]:
    """The extensions of the CPU that `info` describes."""
    return next((set(line.split(":", 1)[1].split()) for line in info.splitlines() if line.startswith("flags")), set())
