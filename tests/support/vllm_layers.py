"""Child process: what `look_at` reads from every attention layer, kernel and method that vLLM lists.

    python vllm_layers.py ANSWER

ANSWER: {"attention": class -> what is read, "towers": ..., "linear": ..., "experts": ..., "unquantized": ...}. The
layers are not built, only given what `look_at` reads of them. "missing": files that need another platform.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from inspect import isabstract
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from fp8pipe.evaluate.environment import prepare_process

_BASES = ("AttentionLayerBase", "MambaBase", "Attention", "LinearAttention", "Unquantized", "FusedMoEExperts")


def main() -> None:
    prepare_process()
    import vllm
    from vllm.platforms import current_platform

    # The modules of other platforms import `vllm._C`. A CPU without AVX-512 has loaded `_C_AVX2`, and torch aborts a
    # process that loads both.
    current_platform.import_kernels()
    sys.modules.setdefault("vllm._C", ModuleType("vllm._C"))

    root = Path(vllm.__file__).parent
    defines = re.compile(rf"^class \w+\([^)]*({'|'.join(_BASES)})", re.MULTILINE)
    missing = [path for path in sorted(root.rglob("*.py")) if defines.search(path.read_text()) and not imported(path)]
    answer = {"missing": [str(path.relative_to(root)) for path in missing]}
    Path(sys.argv[1]).write_text(json.dumps(answer | attention() | kernels()))


def imported(path: Path) -> bool:
    parts = path.with_suffix("").parts
    try:
        importlib.import_module(".".join(parts[len(parts) - 1 - parts[::-1].index("vllm") :]))
    except (ImportError, AssertionError, AttributeError):  # by a part of CUDA, ROCm or Triton that is not here
        return False
    return True


def attention() -> dict[str, Any]:
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def layer(cls: type, **attributes: Any) -> torch.nn.Module:
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        for name, value in attributes.items():
            object.__setattr__(module, name, value)
        return module

    backend = CPUAttentionBackend
    built = {
        "attn_backend": backend,
        "backend_cls": backend,
        "rocm_mxfp4": False,
        "sparse_logits": False,
        "kv_cache_dtype": "fp8",
    }
    layers = {
        f"{cls.__module__}.{cls.__name__}": read(layer(cls, **built))
        for cls in subclasses(AttentionLayerBase)
        if issubclass(cls, torch.nn.Module)
    }
    towers = {
        f"{cls.__name__} {backend.name}": read(layer(cls, attn_backend=backend))
        for cls in (MMEncoderAttention, *subclasses(MMEncoderAttention))
        for backend in AttentionBackendEnum
    }
    return {"attention": layers, "towers": towers}


def kernels() -> dict[str, Any]:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.fused_moe_modular_method import FusedMoEModularMethod
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    def layer(method: object, **attributes: Any) -> torch.nn.Module:
        module = torch.nn.Linear(1, 1)
        for name, value in {"quant_method": method, **attributes}.items():
            object.__setattr__(module, name, value)
        return module

    lists = [getattr(linear, name) for name in dir(linear) if name.startswith("_POSSIBLE_")]
    listed = {kernel for platforms in lists for kernels in platforms.values() for kernel in kernels}
    scheme = [layer(SimpleNamespace(), scheme=SimpleNamespace(kernel=k.__new__(k))) for k in listed]
    config = FusedMoEQuantConfig.make(torch.float8_e4m3fn)
    experts = [cls.__new__(cls) for cls in subclasses(modular_kernel.FusedMoEExperts)]
    for expert in experts:
        object.__setattr__(expert, "quant_config", config)
    held = [layer(SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=expert))) for expert in experts]
    plain = [
        cls for cls in subclasses(QuantizeMethodBase) if any("Unquantized" in base.__name__ for base in cls.__mro__)
    ]
    shared = FusedMoEModularMethod.__new__(FusedMoEModularMethod)
    vars(shared).update(moe_kernel=SimpleNamespace(fused_experts=experts[0]), _modules={}, _parameters={}, _buffers={})
    vars(shared)["old_quant_method"] = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
    return {
        "linear": {kernel.__name__: read(module) for kernel, module in zip(listed, scheme, strict=True)},
        "experts": {type(e).__name__: read(module) for e, module in zip(experts, held, strict=True)},
        "unquantized": {cls.__name__: read(layer(cls.__new__(cls))) for cls in plain} | {"shared": read(layer(shared))},
    }


def read(module: torch.nn.Module) -> Any:
    from fp8pipe.evaluate.worker_side import look_at

    try:
        return look_at(module)
    except Exception as error:
        return {"kernels": [repr(error)], "attention": [], "kv_cache": []}


def subclasses(base: type) -> list[type]:
    """Every concrete class that derives from it."""
    found, open_ = set(), [base]
    while open_:
        derived = open_.pop().__subclasses__()
        open_ += [cls for cls in derived if cls not in found]
        found |= set(derived)
    return sorted((cls for cls in found if not isabstract(cls)), key=str)


if __name__ == "__main__":
    main()
