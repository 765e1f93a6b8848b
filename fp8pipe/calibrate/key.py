"""The key of a calibration: equal keys, equal ranges."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fp8pipe.config import ActivationScheme, KVCacheScheme, Recipe
from fp8pipe.errors import NoSuitableDevice
from fp8pipe.files import digest_of
from fp8pipe.records import Snapshot

CALIBRATION_VERSION = 4
"""Increase it when the same input gives another record."""


def key_of(snapshot: Snapshot, recipe: Recipe, revision: str, device: str) -> str:
    """Digest of source, data, schemes and environment; neither a recipe's name nor a local dataset's path enters it.

    revision: the dataset's. device: resolved.
    """
    is_file = revision.startswith("sha256:")
    data = recipe.calibration.model_dump(mode="json", exclude={"dataset"} if is_file else {"revision"})
    return digest_of(
        {
            "version": CALIBRATION_VERSION,
            "source_commit": snapshot.commit,
            "modules": [recipe.targets, recipe.ignore],
            "weights": recipe.weights.model_dump(mode="json"),
            "activations": recipe.activations and recipe.activations.model_dump(mode="json"),
            "keep_bf16": recipe.keep_bf16 and recipe.keep_bf16.model_dump(mode="json"),
            "observers": observers_of(recipe),
            "data": data | {"revision": revision},
            **asdict(environment(device)),
        }
    )


def observers_of(recipe: Recipe) -> dict[str, Any]:
    """inputs and kv: how their ranges are found; None for what needs no range."""
    inputs = recipe.activations if recipe.static_activations else None
    return {
        "inputs": None if inputs is None else _observer(inputs),
        "kv": None if recipe.kv_cache is None else _observer(recipe.kv_cache) | {"strategy": recipe.kv_cache.strategy},
    }


def _observer(scheme: ActivationScheme | KVCacheScheme) -> dict[str, Any]:
    if scheme.observer == "percentile":
        return {"observer": "percentile", "percentile": scheme.percentile}
    return {"observer": scheme.observer}


@dataclass(frozen=True, slots=True)
class Environment:
    """What changes the last bits of a forward pass. The fields are those of the record."""

    device_class: str
    versions: dict[str, str]
    threads: int
    instructions: str | None


def environment(device: str) -> Environment:
    """That of this process."""
    from importlib.metadata import version

    import torch

    on_gpu = device.startswith("cuda")
    return Environment(
        device_class=_class_of(device) if on_gpu else "cpu",
        versions={"torch": torch.__version__, "transformers": version("transformers")},
        threads=torch.get_num_threads(),
        instructions=None if on_gpu else _instructions(),
    )


def _class_of(device: str) -> str:
    """Hardware class of cuda or cuda:<n>, from the driver's own tool: asking torch would start CUDA in a process that
    only looks for a record. Raises NoSuitableDevice."""
    from fp8pipe.machine.device import class_of_capability
    from fp8pipe.machine.gpus import of_device

    return class_of_capability(*of_device(device)[0].capability)


def _instructions() -> str:
    """The instruction set that this CPU multiplies with, and the 16-bit types that it has instructions for."""
    import torch

    from fp8pipe.calibrate.cpu_linear import is_emulated

    native = (dtype for dtype in (torch.bfloat16, torch.float16) if not is_emulated(dtype, torch.device("cpu")))
    return " ".join((torch.backends.cpu.get_cpu_capability(), *(str(dtype).removeprefix("torch.") for dtype in native)))


def resolved(device: str) -> str:
    """`auto` becomes cuda if there is a GPU, else cpu.

    Raises NoSuitableDevice where torch cannot use the GPUs that are there: it would silently take the CPU.
    """
    import torch

    from fp8pipe.machine.device import unusable_by_torch

    if device == "cpu":
        return device
    if torch.cuda.is_available():
        return "cuda" if device == "auto" else device
    if problem := unusable_by_torch():
        raise NoSuitableDevice(f"device {device}: {problem}; or give --device cpu")
    if device != "auto":
        raise NoSuitableDevice(f"device {device}: torch finds no GPU; give --device cpu, or use a host with one")
    return "cpu"
