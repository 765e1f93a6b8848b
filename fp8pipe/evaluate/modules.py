"""Every Linear and expert layer of vLLM's model, run on a seeded input through the kernel that will serve it.

`prove` runs in each of vLLM's workers once the model is loaded. A layer's input depends on its name alone, so baseline
and candidate can be compared layer by layer, without a prompt that reaches it. Of the output a random projection is
kept: the distance of two projections is that of the outputs, to a few percent.

Inputs are E4M3 numbers times powers of two. Quantizing them is exact in every scheme, so what remains is the weights
and the kernel. Where a Linear has a static scale, its input is multiplied into the scale's range and the output divided
by the same factor. Experts are not linear: they get their input at several levels, and are compared at the largest that
their static scales hold, by their own weights. At small ones gate and up could be exchanged: silu(g) u is then g u / 2.

A layer is called through its quantization method, with the part of the layer that the worker holds: nothing is sent
between workers.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad

ROWS, NUMBERS = 32, 32
"""Of a Linear's input, and of the projection of each row of its output."""
LEVELS = (4.0, 1.0, 0.25, 0.0625)
"""Factors of an expert's inputs, the largest first."""
EXPERT_ROWS = 2
"""Of each expert's input, at each level."""
TOKENS = 256
"""At most so many enter a layer of experts at once: engines bound their workspace by the batches that they expect."""
_GROUP = 128
"""Features of a token that share a scale in block schemes."""
FP8_MAX = 448.0
_LARGEST = 14.0
"""No input is larger: 448 / 128, times the largest power of two."""
STORED = "fp8pipe_stored"
"""Attribute of a layer whose weights are FP8: a `Stored`."""

Layer = Any
"""A vLLM layer: torch types every attribute of a module as a tensor or module."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What the weights and scales of a layer answer as they were loaded (`stored_weights`)."""

    numbers: Tensor
    """The projection of their outputs in float32, [experts, levels, numbers]."""
    level: int
    """The largest level that the static scales hold; 0 without any."""


def prove(model: nn.Module) -> list[dict[str, Any]]:
    """The fields of a ModuleOutput, but for the rank, for each layer. Runs in each of vLLM's workers."""
    with torch.inference_mode():
        return [_proved(name, kind, layer) for name, kind, layer in layers(model)] + list(_absorbed(model))


def layers(model: nn.Module) -> Iterator[tuple[str, str, Layer]]:
    """(name, linear or experts, layer) of each Linear and expert layer."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            yield name, "experts", module
        elif isinstance(module, LinearBase | ParallelLMHead | nn.Linear):
            yield name, "linear", module


def _proved(name: str, kind: str, layer: Layer) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "kind": kind, "scheme": scheme_of(layer)}
    if _is_taken(layer):
        return found
    try:
        numbers = expert_numbers(name, layer) if kind == "experts" else linear_numbers(name, layer)
    except Exception as error:  # whatever a kernel raises: the gate names the layer, and the evaluation continues
        return found | {"fault": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    stored: Stored | None = getattr(layer, STORED, None)
    return found | {
        **_encoded(numbers),
        "static": bool(static_scales(layer)),
        "level": 0 if stored is None else stored.level,
        "stored_error": None if stored is None else relative_error(numbers, stored),
        "fault": _bad_scales(layer),
    }


def _encoded(numbers: Tensor) -> dict[str, Any]:
    halves = numbers.bfloat16().view(torch.int16).numpy()
    return {"shape": tuple(numbers.shape), "outputs": base64.b64encode(halves.tobytes()).decode()}


def _absorbed(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The two products that MLA makes of kv_b_proj's weights: decoding uses them in its place."""
    module: Layer
    for name, module in model.named_modules():
        for leaf in ("W_UK_T", "W_UV"):
            if isinstance(weights := getattr(module, leaf, None), Tensor):
                numbers = _as_matrix(f"{name}.{leaf}", weights)
                known = {"name": f"{name}.{leaf}", "kind": "linear", "scheme": scheme_of(module.kv_b_proj)}
                yield known | _encoded(numbers)


def scheme_of(layer: Layer) -> str:
    """Names of the scheme and the kernel that serve a layer; empty if it is not quantized."""
    from fp8pipe.evaluate.worker_side import kernel_name

    kernel, scheme = kernel_name(layer), getattr(layer, "scheme", None)
    names = (type(layer.quant_method if scheme is None else scheme).__name__, kernel) if kernel else ()
    return ", ".join(dict.fromkeys(names))


def static_scales(layer: Layer) -> dict[str, Tensor]:
    """Those of a layer's inputs, by name."""
    leaves = {leaf: getattr(layer, leaf, None) for leaf in ("input_scale", "w13_input_scale", "w2_input_scale")}
    return {leaf: scale for leaf, scale in leaves.items() if isinstance(scale, Tensor) and scale.numel()}


def _bad_scales(layer: Layer) -> str:
    """What is wrong with the static scales; empty if nothing is."""
    for leaf, scale in static_scales(layer).items():
        if not bool((scale.isfinite() & (scale > 0)).all()):
            return f"{leaf} is {scale.float().min().item():g}"
    return ""


# ---------------------------------------------------------------------------------------------- linear layers


def linear_numbers(name: str, layer: Layer) -> Tensor:
    """float32 [1, 1, ROWS * NUMBERS]: the projection of the outputs of a Linear's own kernel."""
    if _is_convolution(layer):
        return _as_matrix(name, layer.weight)
    factor, bias = _factor(layer), applied_bias(layer)
    x = (inputs(name, ROWS, width_of(layer)) * factor).to(_device(layer), _dtype(layer))
    plain = isinstance(layer, nn.Linear)
    output = (functional.linear(x, layer.weight, bias) if plain else layer.quant_method.apply(layer, x, bias)).float()
    if bias is not None:
        output = output - bias.float()
    output = output / factor
    return project(name, output if bias is None else output + bias.float())


def _as_matrix(name: str, weights: Tensor) -> Tensor:
    """The projection of a product with weights that vLLM uses in another way, [..., features]."""
    matrix = weights.float().reshape(-1, weights.shape[-1])
    return project(name, inputs(name, ROWS, len(matrix)).to(matrix.device) @ matrix)


def _is_taken(layer: Layer) -> bool:
    """Whether the engine took the weights of a Linear into another product and does not run it any more: MLA does, on
    CPUs with AMX. The other kernels for CPUs that leave no weights in a layer have a function in their place."""
    weight = getattr(layer, "weight", None)
    held = getattr(layer, "cpu_linear", functional.linear) is not functional.linear
    return isinstance(weight, Tensor) and not weight.numel() and not held


def _is_convolution(layer: Layer) -> bool:
    """Whether vLLM uses the weights of this layer, a Linear in name, for a convolution."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.platforms import current_platform

    if not isinstance(layer, LinearBase) or scheme_of(layer):
        return False
    weight: Any = layer.weight  # Any: torch types a parameter as a tensor or module
    return weight.dim() > 2 or (current_platform.is_cpu() and not hasattr(layer, "cpu_linear"))


def width_of(layer: Layer) -> int:
    """Features of the input of a Linear, or of the part that this worker holds."""
    for attribute in ("input_size_per_partition", "input_size", "in_features"):
        if hasattr(layer, attribute):
            return getattr(layer, attribute)
    raise AttributeError(f"{type(layer).__name__} does not say how wide its input is")


def applied_bias(layer: Layer) -> Tensor | None:
    """The bias that a Linear's forward passes to its kernel: in a row-parallel layer only the first rank adds it."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    added_later = getattr(layer, "skip_bias_add", False) or (isinstance(layer, RowParallelLinear) and layer.tp_rank)
    return None if added_later else getattr(layer, "bias", None)


def _factor(layer: Layer) -> float:
    """What the input is multiplied by to fill the range of a static scale; 1 without one."""
    scale = static_scales(layer).get("input_scale")
    largest = 0.0 if scale is None else scale.float().max().item()
    return largest * FP8_MAX / _LARGEST if 0.0 < largest < math.inf else 1.0


# ---------------------------------------------------------------------------------------------- experts


def expert_numbers(name: str, layer: Layer) -> Tensor:
    """float32 [experts, levels, numbers]: the projection of the outputs of each expert that this worker holds."""
    ids = _local_experts(layer)
    config = layer.moe_config
    tokens = expert_inputs(name, layer, len(ids)).flatten(0, 2)
    x = pad(tokens, (0, config.hidden_dim - tokens.shape[1])).to(_device(layer), config.in_dtype)
    chosen = ids.repeat_interleave(len(LEVELS) * EXPERT_ROWS).to(x.device)
    output = torch.cat([_experts(layer, *part) for part in zip(x.split(TOKENS), chosen.split(TOKENS), strict=True)])
    return project_experts(name, output[:, : tokens.shape[1]].float(), len(ids))


def expert_inputs(name: str, layer: Layer, experts: int) -> Tensor:
    """float32 [experts, levels, rows, features]."""
    width = layer.moe_config.hidden_dim_unpadded or layer.moe_config.hidden_dim
    rows = inputs(name, experts * EXPERT_ROWS, width, spread=0).view(experts, 1, EXPERT_ROWS, width)
    return rows * torch.tensor(LEVELS, dtype=torch.float32).view(1, -1, 1, 1)


def project_experts(name: str, output: Tensor, experts: int) -> Tensor:
    """float32 [experts, levels, numbers] of outputs [experts * levels * rows, features]."""
    numbers = min(max(2048 // experts, 8), 64)  # fewer of each expert where there are many
    return project(name, output, numbers).view(experts, len(LEVELS), -1)


def _local_experts(layer: Layer) -> Tensor:
    """The numbers under which a router knows the experts of this worker."""
    where = layer.expert_map
    return torch.arange(layer.local_num_experts) if where is None else (where >= 0).nonzero().flatten().cpu()


def _experts(layer: Layer, x: Tensor, chosen: Tensor) -> Tensor:
    """Each token through the expert chosen for it, with the weight of a router that prefers it to all others."""
    layer._ensure_moe_quant_config_init()
    method = layer.quant_method
    if method.is_monolithic:  # it routes by itself: a preference that leaves the others nothing
        logits = torch.full((len(x), layer.global_num_experts), -30.0, device=x.device, dtype=torch.float32)
        logits.scatter_(1, chosen.unsqueeze(1), 30.0)
        return method.apply_monolithic(
            layer=layer, x=x, router_logits=logits.to(layer.moe_config.router_logits_dtype or x.dtype)
        )
    return method.apply(
        layer=layer,
        x=x.clone(),  # some kernels write their output over it
        topk_weights=torch.full((len(x), 1), layer.routed_scaling_factor, device=x.device, dtype=torch.float32),
        topk_ids=chosen.unsqueeze(1).to(method.topk_indices_dtype or torch.int32),
        shared_experts=None,
        shared_experts_input=None,
    )


# ---------------------------------------------------------------------------------------------- draws


def inputs(name: str, rows: int, features: int, spread: int = 2) -> Tensor:
    """float32 [rows, features]: E4M3 numbers / 128, the largest of each 128 being 448, times a power of two for each
    128, from 2**-spread to 2**spread. A dynamic scale, per tensor, token or group, is then a power of two, and every
    code exact."""
    source = _source(name, "inputs")
    drawn = torch.randn(rows, features, generator=source, dtype=torch.float32)
    groups = pad(drawn, (0, -features % _GROUP)).unflatten(1, (-1, _GROUP))
    codes = (groups * (FP8_MAX / groups.abs().amax(dim=2, keepdim=True))).to(torch.float8_e4m3fn).float()
    powers = 2.0 ** torch.randint(-spread, spread + 1, (*groups.shape[:2], 1), generator=source)
    return (codes / _GROUP * powers).flatten(1)[:, :features]


def project(name: str, output: Tensor, numbers: int = NUMBERS) -> Tensor:
    """float32 [1, 1, rows * numbers] on the CPU: random combinations of the features of `output` [rows, features]."""
    combinations = torch.randn(output.shape[1], numbers, generator=_source(name, "outputs"), dtype=torch.float32).to(
        output.device
    )
    return (output @ combinations).div_(math.sqrt(output.shape[1])).cpu().view(1, 1, -1)


def _source(name: str, what: str) -> torch.Generator:
    digest = sha256(f"{what} of {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def relative_error(numbers: Tensor, stored: Stored) -> float:
    """The root of the mean square over experts, at the level that the scales hold. Infinite if it is not finite."""
    found, expected = numbers[:, stored.level], stored.numbers[:, stored.level]
    distance = (found - expected).norm(dim=1)
    error = (distance / expected.norm(dim=1)).masked_fill(distance == 0, 0.0)
    return float(error.nan_to_num(nan=math.inf).square().mean().sqrt())


def _device(layer: Layer) -> torch.device:
    return next(layer.parameters()).device


def _dtype(layer: Layer) -> torch.dtype:
    """Dtype of a Linear's input."""
    return layer.weight.dtype if isinstance(layer, nn.Linear) else getattr(layer, "params_dtype", torch.bfloat16)
