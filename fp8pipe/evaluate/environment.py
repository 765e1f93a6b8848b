"""What a process that runs lm-eval over vLLM needs around it; shared by the worker and by the lm-eval command line.

Versions are read from package metadata, so that this module answers without importing torch or vLLM. Run as a script it
prints them as JSON: that is how another interpreter (`evaluate(..., python=...)`) is asked for its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

CPU_ENGINE_ARGUMENTS: dict[str, Any] = {  # Any: values of vLLM's engine arguments
    "enforce_eager": True,  # compiling takes longer than a small evaluation
    "gpu_memory_utilization": 0.3,  # of the memory node, on CPU; vLLM refuses to start when it is not free
    "distributed_executor_backend": "uni",  # no worker process: half the start-up time
}
"""Engine arguments on vLLM's CPU platform, where neither the suite nor the user says otherwise."""

_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: faster to start, and open to inspection
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_CPU_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "TORCH_COMPILE_DISABLE": "1",  # even an eager engine compiles one helper of prompt logprobs: 10 s and more of C++
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),  # unset, vLLM keeps a core for serving
}


def vllm_version() -> str:
    """vLLM's version as vLLM itself states it; the CPU distribution `vllm-cpu` has `+cpu` appended."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("vllm-cpu") + "+cpu"


def is_cpu_build(version: str) -> bool:
    """Whether this vLLM serves on the CPU whatever the machine has; vLLM decides by the same substring."""
    return "cpu" in version


def library_versions(python: str | None = None) -> dict[str, str]:
    """Versions of what builds prompts and answers them, here or in another interpreter.

    PackageNotFoundError, or CalledProcessError from another interpreter, when vLLM or lm-eval is not installed.
    """
    if python is not None and python != sys.executable:
        answer = subprocess.run([python, "-I", __file__], capture_output=True, text=True, check=True)
        return json.loads(answer.stdout)
    names = ("lm_eval", "transformers", "torch")
    return {"vllm": vllm_version()} | {name: importlib.metadata.version(name) for name in names}


def prepare_process() -> None:
    """Set the environment (what the user has set stays) and answer lm-eval's question for vLLM's version.

    lm-eval asks `importlib.metadata` for the distribution `vllm`, which the CPU build does not have. To be called
    before torch, vLLM or lm-eval is imported.
    """
    version = vllm_version()
    for name, value in (_VARIABLES | (_CPU_VARIABLES if is_cpu_build(version) else {})).items():
        os.environ.setdefault(name, value)
    installed: Callable[[str], str] = importlib.metadata.version
    importlib.metadata.version = lambda name: version if name == "vllm" else installed(name)


def use_cpu_engine() -> None:
    """On the CPU platform, give lm-eval an `LLM` with CPU_ENGINE_ARGUMENTS as its defaults."""
    from lm_eval.models import vllm_causallms
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _weigh_what_is_loaded()
        vllm_causallms.LLM = _cpu_engine  # pyright: ignore[reportAttributeAccessIssue]  a class becomes a function


def _cpu_engine(model: str, **given: Any) -> LLM:  # Any: vLLM's engine arguments, passed through
    from vllm import LLM

    import_architecture(model, given.get("trust_remote_code", False))
    return LLM(model, **(CPU_ENGINE_ARGUMENTS | given))


_PREPARE = "process_weights_after_loading"
"""What vLLM's loaders call, by the name under which they imported it, once a model's weights are there."""


def _weigh_what_is_loaded() -> None:
    """Note the bytes of a model's weights before the CPU's kernels pack them into memory of their own.

    What they have packed is no tensor any more, and would not be counted. The engine runs in this process here.
    """
    from vllm.model_executor.model_loader import base_loader

    from fp8pipe.evaluate.engine import weight_bytes

    prepare = getattr(base_loader, _PREPARE)

    def weigh_and_prepare(model: Any, *arguments: Any) -> None:  # Any: a module that gets a number; passed through
        model.loaded_bytes = weight_bytes(model)
        prepare(model, *arguments)

    setattr(base_loader, _PREPARE, weigh_and_prepare)


def import_architecture(model: str, trust_remote_code: bool) -> None:
    """Register the model's class as already imported.

    vLLM otherwise looks at the class in a process of its own, so as not to initialise CUDA in this one, and pays a
    second import of itself (15 s and more) for every architecture that it has not met on this machine.
    """
    from transformers import AutoConfig
    from vllm.model_executor.models.registry import ModelRegistry

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    for name in config.architectures or ():
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


if __name__ == "__main__":
    print(json.dumps(library_versions()))
