"""The tables of docs/gpu.md, made anew: the answers on machines that are not here, and the kernels that vLLM takes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import table
from fp8pipe.errors import NoSuitableDevice
from fp8pipe.machine import device
from fp8pipe.machine.fit import Need, tensor_size
from fp8pipe.ui import doctor
from support import ROOT
from support.nvidia_smi import MACHINES, Machine

PAGE = ROOT / "docs" / "gpu.md"
SMALL = Need("Llama 8B unquantized", 16_060_000_000, 537_000_000, 4096)
LARGE = Need("Llama 70B unquantized", 141_100_000_000, 1_342_000_000, 4096)
CPU = {"torch": None, "vllm": "cpu"}
CASES: tuple[tuple[str, Machine, Need, dict[str, Any]], ...] = (
    ("no GPU", MACHINES["no GPU"], SMALL, {}),
    ("no GPU, CPU profile", MACHINES["no GPU"], SMALL, CPU),
    ("A100", MACHINES["A100"], SMALL, {}),
    ("H100", MACHINES["H100"], SMALL, {}),
    ("H100, CPU profile", MACHINES["H100"], SMALL, CPU),
    ("H100, model of 70B", MACHINES["H100"], LARGE, {}),
    ("H100, in use", MACHINES["H100, busy"], SMALL, {}),
    ("8 x H100", MACHINES["8 x H100"], SMALL, {}),
    ("8 x H100, model of 70B", MACHINES["8 x H100"], LARGE, {}),
    ("B200", MACHINES["B200"], SMALL, {}),
    ("B300", MACHINES["B300"], LARGE, {}),
    ("H100 divided by MIG", MACHINES["MIG"], SMALL, {}),
    ("MIG, model of 70B", MACHINES["MIG"], LARGE, {}),
    ("driver for CUDA 12.4", MACHINES["old driver"], SMALL, {}),
    ("driver that fails", MACHINES["broken driver"], SMALL, {}),
)

RECIPES = {
    "fp8-dynamic": ("channel", "dynamic"),
    "fp8-static, fp8-static-kv": ("tensor", "static"),
    "fp8-block": ("block", "dynamic"),
    "autofp8-dynamic": ("tensor", "dynamic"),
    "autofp8-static": ("tensor", "static"),
}
CAPABILITIES = {"Ada": (89,), "Hopper": (90,), "Blackwell": (100, 103, 120, 121)}
KERNELS = {
    "CutlassFP8ScaledMMLinearKernel": "Cutlass",
    "FlashInferFP8ScaledMMLinearKernel": "FlashInfer",
    "FlashInferFp8DeepGEMMDynamicBlockScaledKernel": "DeepGEMM by FlashInfer",
    "DeepGemmFp8BlockScaledMMKernel": "DeepGEMM",
    "MarlinFP8ScaledMMLinearKernel": "Marlin: W8A16",
}


def section(name: str, page: Path = PAGE) -> str:
    """What stands between the marks of this name."""
    return page.read_text().partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]


def machines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The table of machines, and the sentences that it refers to."""
    numbers: dict[str, int] = {}
    monkeypatch.setattr(device, "cpu_problem", lambda info: None)
    rows = []
    for name, machine, need, profile in CASES:
        machine.become(folder, monkeypatch, **profile)
        found = doctor._device()
        said = device.examine()
        seen = found.outcome + _marks((*said.problems, *said.warnings), numbers)
        rows.append([name, seen, _outcome(need, numbers), _outcome(need, numbers, starts=True)])
    notes = [textwrap.fill(f"- [{n}] {text}.", 120, subsequent_indent="  ") for text, n in numbers.items()]
    return "\n" + table(["machine", "doctor", "release", "engine's process"], rows) + "\n" + "\n".join(notes) + "\n\n"


def _outcome(need: Need, numbers: dict[str, int], *, starts: bool = False) -> str:
    try:
        if gpus := device.detect().gpus:
            need = replace(need, gpus=tensor_size(need, gpus))
        machine = device.require([need], starts=starts)
    except NoSuitableDevice:
        return "refuses" + _marks(device.examine([need], starts=starts).problems, numbers)
    return ("warns" if machine.warnings else "runs") + _marks(machine.warnings, numbers)


def _marks(texts: Sequence[str], numbers: dict[str, int]) -> str:
    return "".join(f" [{numbers.setdefault(text, len(numbers) + 1)}]" for text in texts)


def kernel_cases() -> list[dict[str, Any]]:
    """A Linear of 4096 x 4096 under each recipe, for `kernel_for` in vllm_world.py."""
    known = {"shape": [4096, 4096], "model_type": "llama", "dtype": "bfloat16"}
    return [
        {"capability": capability, "weights": weights, "inputs": inputs, **known}
        for weights, inputs in RECIPES.values()
        for capabilities in CAPABILITIES.values()
        for capability in capabilities
    ]


def kernels(answers: Sequence[str]) -> str:
    """The table of Linears. answers: of `kernel_cases`."""
    chosen, rows = iter(answers), []
    for recipe in RECIPES:
        row = [recipe]
        for capabilities in CAPABILITIES.values():
            words = {KERNELS[next(chosen)] for _ in capabilities}
            row.append(" or ".join(sorted(words)))
        rows.append(row)
    return "\n" + table(["recipe", *CAPABILITIES], rows) + "\n"
