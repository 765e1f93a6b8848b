"""The environment that lm-eval over vLLM needs in its process, shared by the worker and the lm-eval command line.

Versions are read from package metadata, so this module answers without importing torch or vLLM.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fp8pipe.config import Parallel
from fp8pipe.errors import EngineFailed
from fp8pipe.machine.builds import is_cpu_build, vllm_version
from fp8pipe.machine.engine_python import VARIABLE, engine

if TYPE_CHECKING:
    from vllm import LLM

CPU_ENGINE_ARGUMENTS: dict[str, Any] = {  # Any: values of vLLM's engine arguments
    "enforce_eager": True,  # compiling takes longer than a small evaluation
    "gpu_memory_utilization": 0.3,  # a share of the NUMA node's memory; vLLM refuses to start unless it is free
    "distributed_executor_backend": "uni",  # no worker process: half the start-up time
}
"""Default engine arguments on vLLM's CPU platform for a model on one rank. See `cpu_engine_arguments`."""

BINDING = "VLLM_CPU_OMP_THREADS_BIND"
"""Environment variable of vLLM: each rank's processors, with `|` between. By default vLLM binds each rank to a NUMA
node of its own, and refuses to start if there are too few."""

_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process: it starts faster and can be inspected
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # vLLM forks by default, from a process that runs threads by then
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_CPU_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "TORCH_COMPILE_DISABLE": "1",  # even an eager engine compiles one helper for prompt logprobs: over 10 s of C++
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),  # otherwise vLLM reserves a core for serving
}


def cpu_engine_arguments(parallel: Parallel) -> dict[str, Any]:
    """Default engine arguments on vLLM's CPU platform, which the suite and the user may override.

    Of a model that is spread over several ranks, each is a process: in one process vLLM waits for the others forever.
    """
    several = {"distributed_executor_backend": "mp"} if parallel.copy_devices > 1 else {}
    return CPU_ENGINE_ARGUMENTS | several


def library_versions() -> dict[str, str]:
    """Versions of the engine's libraries that build prompts and answer them. Raises EngineFailed if one is missing."""
    found = {"vllm": vllm_version()} | {name: engine().version(name) for name in ("lm_eval", "transformers", "torch")}
    versions = {name: version for name, version in found.items() if version is not None}
    if missing := found.keys() - versions.keys():
        raise EngineFailed(
            f"evaluating needs {', '.join(sorted(missing))}, not installed for {engine().python}; "
            f"install the cpu or gpu extra, or name the interpreter of an environment that has them in {VARIABLE}"
        )
    return versions


def prepare_process() -> None:
    """Set environment variables that the user has not set, and make vLLM's version known to lm-eval.

    lm-eval asks `importlib.metadata` for the distribution `vllm`, which the CPU build does not have. Call this before
    torch, vLLM or lm-eval is imported.
    """
    version = library_versions()["vllm"]
    for name, value in (_VARIABLES | (_CPU_VARIABLES if is_cpu_build(version) else {})).items():
        os.environ.setdefault(name, value)
    installed: Callable[[str], str] = importlib.metadata.version
    importlib.metadata.version = lambda name: version if name == "vllm" else installed(name)


def use_cpu_engine() -> None:
    """On the CPU platform, make `cpu_engine_arguments` the defaults of the `LLM` that lm-eval creates."""
    from lm_eval.models import vllm_causallms

    vllm_causallms.LLM = engine_class()  # pyright: ignore[reportAttributeAccessIssue]  a class becomes a function


def engine_class() -> Callable[..., LLM]:
    """vLLM's `LLM`; on the CPU platform with `cpu_engine_arguments` as its defaults."""
    from vllm import LLM
    from vllm.platforms import current_platform

    return _cpu_engine if current_platform.is_cpu() else LLM


def _cpu_engine(model: str, **given: Any) -> LLM:  # Any: vLLM's engine arguments, passed through
    from vllm import LLM

    import_architecture(model, given.get("trust_remote_code", False))
    parallel = Parallel.of(given)
    if parallel.copy_devices > 1:
        os.environ.setdefault(BINDING, "|".join(processor_shares(parallel.copy_devices)))
    return LLM(model, **(cpu_engine_arguments(parallel) | given))


def processor_shares(count: int) -> list[str]:
    """So many equal shares of the processors that this process may use, each as `0,2`. If they are fewer than that,
    every share is all of them."""
    cores = sorted(os.sched_getaffinity(0))
    return [",".join(map(str, cores[place::count] if count <= len(cores) else cores)) for place in range(count)]


def import_architecture(model: str, trust_remote_code: bool) -> None:
    """Import the model's class and register it with vLLM.

    Otherwise vLLM inspects the class in a subprocess, to keep CUDA uninitialised in this one, and so imports itself a
    second time (15 s and more) for every architecture that is new to this machine.
    """
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import get_config

    config = get_config(model, trust_remote_code=trust_remote_code)  # it knows more configs than transformers does
    for name in config.architectures or ():
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
