"""Child process: what vLLM's own classes say at several tensor-parallel sizes, and on GPUs that are not there.

    python vllm_world.py REQUEST ANSWER

REQUEST: {"folders": [folder with config.json, ...]}, and lists of the arguments of `ask_linear`, `ask_experts`,
`quantized_drafts` and `kernel_for` as "linears", "experts", "drafts" and "kernels", and the names of "towers". The
ranks are a number in vLLM's parallel state: nothing is communicated and nothing computed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RANKS = (1, 2, 4, 8)
BLOCK = 128


def main() -> None:
    from fp8pipe.oracle import vllm_probe

    request, path = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    vllm_probe.prepare(path.with_name("store"))
    answer: dict[str, Any] = {"kernels": on_devices(request["kernels"])}
    answer["folders"] = {folder: ask_model(Path(folder)) for folder in request["folders"]}
    answer["drafts"] = [quantized_drafts(**case) for case in request["drafts"]]
    with world_of(Path(request["folders"][0])) as group:
        answer["linears"] = [ask_linear(group, **case) for case in request["linears"]]
        answer["experts"] = [ask_experts(group, **case) for case in request["experts"]]
        answer["groups"] = {str(columns): takes_inputs(columns) for columns in (128, 192)}
        answer["towers"] = {name: ask_tower(group, name) for name in request["towers"]}
    path.write_text(json.dumps(answer))


# ---------------------------------------------------------------------------------------------- whole models


@contextlib.contextmanager
def world_of(folder: Path, *, expert_parallel: bool = False, ranks: int = 1) -> Iterator[Any]:
    """vLLM's config for a model is current; yields the tensor-parallel group, whose size can be changed."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel, initialize_model_parallel, parallel_state
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=str(folder), load_format="dummy", enforce_eager=True, skip_tokenizer_init=True)
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        initialize_model_parallel(1)
        config.parallel_config.tensor_parallel_size = ranks
        config.parallel_config.enable_expert_parallel = expert_parallel
        try:
            config.model_config.verify_with_parallel_config(config.parallel_config)
            group = parallel_state._TP
            group.world_size = ranks
            group.config = config
            yield group
        finally:
            parallel_state._TP.world_size = 1
            destroy_model_parallel()


def ask_model(folder: Path) -> dict[str, str]:
    """Number of ranks, with `e` for experts in parallel -> vLLM's message as it builds the model; empty if it does."""
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    sparse = "num_experts" in json.loads((folder / "config.json").read_text())
    answers = {}
    for ranks in RANKS:
        for parallel in (False, True) if ranks > 1 and sparse else (False,):
            try:
                with world_of(folder, expert_parallel=parallel, ranks=ranks) as group:
                    dtype = group.config.model_config.dtype
                    place = "cpu" if parallel else "meta"  # the map of experts to ranks is looked at
                    with torch.device(place), set_default_torch_dtype(dtype):
                        initialize_model(group.config)
                    words = ""
            except Exception as error:
                words = f"{type(error).__name__}: {error}"
            answers[f"{ranks}{'e' * parallel}"] = words
    return answers


class Speculation:
    """As much of vLLM's SpeculativeConfig as a draft model asks for: every feature of it is off."""

    def __init__(self, draft_model_config: Any) -> None:
        self.draft_model_config = draft_model_config

    def __getattr__(self, name: str) -> bool:
        return False


def quantized_drafts(folder: str, module: str, kind: str) -> list[str]:
    """Names of the FP8 parameters of vLLM's model for the layers that predict a second token."""
    import torch
    from vllm.utils.torch_utils import set_default_torch_dtype

    with world_of(Path(folder)) as group:
        config = group.config
        config.speculative_config = Speculation(SimpleNamespace(hf_config=config.model_config.hf_config))
        build = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), kind)
        with torch.device("meta"), set_default_torch_dtype(config.model_config.dtype):
            model = build(vllm_config=config)
    return [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn]


# ---------------------------------------------------------------------------------------------- single layers


def quantization(method: str, strategy: str) -> Any:
    """vLLM's own config object for dynamic FP8 by channel or by block."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    if method == "fp8":
        return Fp8Config(True, "dynamic", weight_block_size=[BLOCK, BLOCK])
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
    if strategy == "block":
        weights["block_structure"] = [BLOCK, BLOCK]
        inputs |= {"strategy": "group", "group_size": BLOCK}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": "float-quantized"}
    return CompressedTensorsConfig.from_config(
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    )


def takes_inputs(columns: int) -> bool:
    """Whether vLLM quantizes inputs of so many columns in groups of 128; without data it would go no further."""
    import torch
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    try:
        per_token_group_quant_fp8(torch.ones(4, columns), BLOCK)
    except AssertionError as error:
        return "divisible" not in str(error)
    except (AttributeError, RuntimeError):  # the check is passed, and the kernel behind it needs a GPU
        return True
    return True


def ask_tower(group: Any, name: str) -> list[bool]:
    """For each number of ranks: whether vLLM builds the attention of an encoder with six heads."""
    return [builds_tower(group, name, ranks) for ranks in RANKS]


def builds_tower(group: Any, name: str, ranks: int) -> bool:
    import torch
    from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig
    from vllm.model_executor.layers.attention import MMEncoderAttention
    from vllm.model_executor.models import clip, intern_vit, qwen2_5_vl, siglip

    sizes: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 512}
    plain = PretrainedConfig(**sizes, qkv_bias=False, qk_normalization=False, layer_norm_eps=1e-6)
    makers = {
        "siglip_vision_model": lambda: siglip.SiglipAttention(
            SiglipVisionConfig(**sizes), prefix="a", attn_cls=MMEncoderAttention
        ),
        "clip_vision_model": lambda: clip.CLIPAttention(
            CLIPVisionConfig(**sizes), prefix="b", attn_cls=MMEncoderAttention
        ),
        "qwen2_5_vl": lambda: qwen2_5_vl.Qwen2_5_VisionAttention(384, 6, 384, prefix="c"),
        "intern_vit_6b": lambda: intern_vit.InternParallelAttention(plain, prefix="d"),
    }
    group.world_size = ranks
    try:
        with torch.device("meta"):
            makers[name]()
    except AssertionError:
        return False
    finally:
        group.world_size = 1
    return True


def ask_linear(
    group: Any, kind: str, method: str, strategy: str, rows: list[int], columns: int, size: int
) -> list[bool]:
    """For each number of ranks: whether every rank builds the layer and loads the part that is its own."""
    return [loads_right(group, ranks, kind, method, strategy, rows, columns, size) for ranks in RANKS]


def loads_right(
    group: Any, ranks: int, kind: str, method: str, strategy: str, rows: list[int], columns: int, size: int
) -> bool:
    group.world_size = ranks
    try:
        for rank in range(ranks):
            group.rank_in_group = rank
            if not rank_loads_right(rank, ranks, kind, quantization(method, strategy), rows, columns, size):
                return False
    except (AssertionError, RuntimeError, ValueError):
        return False
    finally:
        group.world_size, group.rank_in_group = 1, 0
    return True


def rank_loads_right(rank: int, ranks: int, kind: str, config: Any, rows: list[int], columns: int, size: int) -> bool:
    """Whether the weights times their scales are this rank's part of the whole matrix."""
    import torch

    layer = make_layer(kind, config, rows, columns, size)
    scale = layer.weight_scale_inv if hasattr(layer, "weight_scale_inv") else layer.weight_scale
    by_block = scale.shape[1] > 1 or scale.shape[0] < layer.weight.shape[0]
    wanted = []
    for index, count in enumerate(rows):
        codes = (torch.arange(count * columns) % 7 + 1).reshape(count, columns).float()
        grid = (-(-count // BLOCK), -(-columns // BLOCK)) if by_block else (count, 1)
        scales = torch.arange(1, grid[0] * grid[1] + 1).reshape(grid).float() + 1000 * index
        name = {"qkv": "qkv"[index], "merged": index}.get(kind)
        for parameter, tensor in ((layer.weight, codes.to(torch.float8_e4m3fn)), (scale, scales)):
            arguments = (parameter, tensor) if name is None else (parameter, tensor, name)
            parameter.weight_loader(*arguments)
        spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) if by_block else scales
        whole = codes * (spread[:count, :columns] if by_block else spread)
        if kind == "whole":
            wanted.append(whole)
        elif kind == "row":
            wanted.append(whole[:, columns // ranks * rank :][:, : columns // ranks])
        else:
            heads = count // size if kind == "qkv" and index else ranks
            share, place = (count // ranks, rank) if heads >= ranks else (size, rank // (ranks // heads))
            wanted.append(whole[share * place :][:share])
    spread = scale.data
    if by_block:
        spread = spread.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        spread = spread[: layer.weight.shape[0], : layer.weight.shape[1]]
    return torch.equal(layer.weight.data.float() * spread, torch.cat(wanted))


def make_layer(kind: str, config: Any, rows: list[int], columns: int, size: int) -> Any:
    from vllm.model_executor.layers import linear

    common = {"bias": False, "quant_config": config, "prefix": "model.layers.0.some_proj"}
    if kind == "qkv":
        heads, kv = rows[0] // size, rows[1] // size
        return linear.QKVParallelLinear(columns, size, heads, kv, **common)
    if kind == "merged":
        return linear.MergedColumnParallelLinear(columns, rows, **common)
    if kind == "column":
        return linear.ColumnParallelLinear(columns, rows[0], **common)
    if kind == "row":
        return linear.RowParallelLinear(columns, rows[0], **common)
    return linear.ReplicatedLinear(columns, rows[0], **common)


def ask_experts(group: Any, method: str, width: int, hidden: int, expert_parallel: bool) -> list[bool]:
    """For each number of ranks: whether the checks and the refinement of FP8 blocks let experts of this width pass."""
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import resolve_fp8_moe_weight_block_shape
    from vllm.model_executor.layers.quantization.utils.fp8_utils import validate_fp8_block_shape_moe
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym

    passed = []
    for ranks in RANKS:
        cut = 1 if expert_parallel else ranks
        group.world_size = ranks
        moe = SimpleNamespace(
            intermediate_size_per_partition=width // cut, tp_size=cut, hidden_dim=hidden, moe_backend="auto"
        )
        refine = None
        try:
            assert width % cut == 0
            if method == "fp8":
                _, refine = resolve_fp8_moe_weight_block_shape(moe, [BLOCK, BLOCK], kFp8Dynamic128Sym, True)
            if refine is None:
                validate_fp8_block_shape_moe(width // cut, [BLOCK, BLOCK])
            passed.append(True)
        except (AssertionError, ValueError):
            passed.append(False)
        finally:
            group.world_size = 1
    return passed


# ---------------------------------------------------------------------------------------------- kernels


def on_devices(cases: list[dict[str, Any]]) -> list[str]:
    """What vLLM chooses for each case; one process per device, since vLLM caches what it finds out about it."""
    import vllm.model_executor.kernels.linear  # noqa: F401  # once, for all of them

    chosen: dict[int, list[str]] = {}
    for capability in {case["capability"] for case in cases}:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            with os.fdopen(writer, "w") as out:
                pretend(capability)
                out.write(json.dumps([kernel_for(**case) for case in cases if case["capability"] == capability]))
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            chosen[capability] = json.loads(answer.read() or "[]")
        os.waitpid(child, 0)
    return [chosen[case["capability"]].pop(0) for case in cases]


def pretend(capability: int) -> None:
    """This process has a GPU of that compute capability, and the packages of vLLM's CUDA wheel.

    Which FP8 kernels of C++ exist is not in Python: csrc/libtorch_stable/quantization/w8a8/cutlass says 8.9 for plain
    ones, and 9.0 for blocks and for grouped experts."""
    from vllm import _custom_ops as ops
    from vllm.platforms import PlatformEnum, current_platform
    from vllm.platforms.interface import DeviceCapability
    from vllm.utils import deep_gemm, flashinfer

    have = DeviceCapability(capability // 10, capability % 10)
    facts = {
        "_enum": PlatformEnum.CUDA,
        "is_cuda": lambda: True,
        "is_cuda_alike": lambda: True,
        "is_cpu": lambda: False,
        "supports_fp8": lambda: True,
        "get_device_capability": lambda device_id=0: have,
        "has_device_capability": lambda wanted, device_id=0: have.to_int() >= as_number(wanted),
        "is_device_capability": lambda wanted, device_id=0: have.to_int() == as_number(wanted),
        "is_device_capability_family": lambda wanted, device_id=0: have.to_int() // 10 == as_number(wanted) // 10,
        "support_deep_gemm": lambda: have.to_int() // 10 in (9, 10, 12),
    }
    for name, value in facts.items():
        setattr(type(current_platform), name, staticmethod(value) if callable(value) else value)
    ops.cutlass_scaled_mm_supports_fp8 = lambda number: number >= 89
    ops.cutlass_scaled_mm_supports_block_fp8 = lambda number: number >= 90
    ops.cutlass_group_gemm_supported = lambda number: number // 10 in (9, 10)
    deep_gemm.has_deep_gemm = lambda: True
    deep_gemm._lazy_init = lambda: None
    deep_gemm._fp8_gemm_nt_impl = print
    for name in vars(flashinfer):
        if name.startswith("has_flashinfer"):
            setattr(flashinfer, name, lambda: True)
    flashinfer.has_flashinfer_fp8_blockscale_gemm = lambda: have.to_int() == 90
    from vllm.model_executor.kernels.linear.scaled_mm import cutlass
    from vllm.model_executor.kernels.linear.scaled_mm import flashinfer as kernels
    from vllm.model_executor.layers.fused_moe.experts import flashinfer_cutlass_moe, trtllm_fp8_moe

    cutlass.CUTLASS_BLOCK_FP8_SUPPORTED = ops.cutlass_scaled_mm_supports_block_fp8(capability)
    kernels.has_flashinfer = lambda: True
    flashinfer_cutlass_moe.has_flashinfer_cutlass_fused_moe = lambda: True
    trtllm_fp8_moe.has_flashinfer_trtllm_fused_moe = lambda: True


def as_number(capability: Any) -> int:
    return capability if isinstance(capability, int) else capability[0] * 10 + capability[1]


def kernel_for(capability: int, weights: str, inputs: str, shape: list[int], model_type: str, dtype: str) -> str:
    """Name of the class that vLLM chooses for one Linear."""
    import torch
    from vllm.config import vllm as current
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    config = SimpleNamespace(kernel_config=SimpleNamespace(linear_backend_per_quant=None, linear_backend="auto"))
    config.model_config = SimpleNamespace(hf_text_config=SimpleNamespace(model_type=model_type), dtype=None)
    weight_key = {
        "tensor": keys.kFp8StaticTensorSym,
        "channel": keys.kFp8StaticChannelSym,
        "block": keys.kFp8Static128BlockSym,
    }[weights]
    input_key = {
        "static": keys.kFp8StaticTensorSym,
        "dynamic": keys.kFp8Dynamic128Sym if weights == "block" else keys.kFp8DynamicTokenSym,
    }[inputs]
    layer = linear.FP8ScaledMMLinearLayerConfig(
        weight_quant_key=weight_key,
        activation_quant_key=input_key,
        input_dtype=getattr(torch, dtype),
        out_dtype=getattr(torch, dtype),
        weight_shape=(shape[0], shape[1]),
    )
    known = linear._POSSIBLE_FP8_BLOCK_KERNELS if weights == "block" else linear._POSSIBLE_FP8_KERNELS
    current._current_vllm_config = config
    kind = linear.choose_scaled_mm_linear_kernel(
        layer, known, compute_capability=capability, quantization="fp8_block_w8a8"
    )
    return kind.__name__


if __name__ == "__main__":
    main()
