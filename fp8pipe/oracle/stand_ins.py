"""Stand-ins for what vLLM imports, or chooses, before it builds a model, and what building one never uses.

Kernels: this machine may have none for a scheme. torchvision: vLLM and transformers import it to process images, for
every model that sees; the builds on PyPI are for CUDA, and beside a CPU build of torch they raise an error on import
(`operator torchvision::nms does not exist`). Values: some models read a tensor that they have just computed, such as
the slopes of ALiBi, and on the meta device it has none. The child process that asks vLLM neither runs a kernel nor
opens an image, and compares no value, so it offers what has the names and does nothing. Nothing else may use this
module.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_IMAGES = "torchvision"


def offer() -> None:
    """Add a stand-in kernel to the end of each of vLLM's lists, torchvision if it cannot be imported, and values to
    tensors without data."""
    _offer_torchvision()
    _offer_kernels()
    _offer_values()


# ---------------------------------------------------------------------------------------------- kernels


def _offer_kernels() -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms import current_platform

    for kernels in (linear._POSSIBLE_FP8_KERNELS, linear._POSSIBLE_FP8_BLOCK_KERNELS, linear._POSSIBLE_WFP8A16_KERNELS):
        kernels.setdefault(current_platform._enum, []).append(StandInKernel)  # type: ignore[arg-type] # never run


class StandInKernel:
    """A kernel that accepts any layer and computes nothing."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: object) -> tuple[bool, str | None]:
        return True, None

    def __init__(self, config: object, layer_param_names: object = None) -> None: ...

    def input_quant_key(self) -> None:
        return None


# ---------------------------------------------------------------------------------------------- values


def _offer_values() -> None:
    """Where Python reads a tensor on the meta device, it reads ones."""
    import torch

    def offer_one(name: str, stand_in: Callable[[torch.Tensor], Any]) -> None:  # Any: as torch's methods return
        real = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            return stand_in(self) if self.is_meta else real(self, *arguments, **options)

        setattr(torch.Tensor, name, read)

    offer_one("cpu", lambda tensor: tensor)
    offer_one("item", lambda tensor: torch.ones((), dtype=tensor.dtype, device="cpu").item())
    offer_one("tolist", lambda tensor: torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu").tolist())


# ---------------------------------------------------------------------------------------------- torchvision


def _offer_torchvision() -> None:
    try:
        importlib.import_module(_IMAGES)
    except (ImportError, RuntimeError, OSError):  # missing, made for another torch, or without its own libraries
        for name in [name for name in sys.modules if _is_inside(name)]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] == _IMAGES


class _Finder(MetaPathFinder, Loader):
    """Finds every module of the package, whatever its name."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if _is_inside(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _InertModule(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


class _InertModule(ModuleType):
    """Has every attribute that it is asked for: a class that can be called, subclassed and asked in turn."""

    __version__ = "0"
    __file__ = "none"

    def __getattr__(self, name: str) -> type:
        return _attribute(self, name)


class _InertType(type):
    def __getattr__(cls, name: str) -> type:
        return _attribute(cls, name)


class _Inert(metaclass=_InertType):
    def __init__(self, *arguments: object, **options: object) -> None: ...


def _attribute(owner: Any, name: str) -> type:  # Any: a module or a class
    if name.startswith("__"):
        raise AttributeError(name)
    found = _InertType(name, (_Inert,), {})
    setattr(owner, name, found)
    return found
