"""What the weights and scales of a checkpoint say that its layers answer, before the engine prepares them.

vLLM changes weights once they are loaded: it packs them for a kernel, and where a kernel wants one scale for what the
checkpoint gives several, or powers of two, it quantizes them again. `watch_loading` has each quantized layer's product
computed just before, in float32, for `modules.prove` to compare with what the kernel then answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8pipe.evaluate import modules
from fp8pipe.evaluate.worker_side import LOADED_BYTES, weight_bytes

_PREPARE = "process_weights_after_loading"
"""The function that vLLM's loaders call once a model's weights are loaded, by the name under which they import it."""

_PREPARED = "_already_called_process_weights_after_loading"
"""vLLM's own mark on a layer that it has prepared while loading."""

_BLOCK = 128

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
"""Of experts, by vLLM's names, where the first half of the first product is the gate."""


def watch_loading() -> None:
    """From now on, have the models that this process loads noted before they are prepared. Does nothing if they are.

    On a CPU their bytes are noted too: the kernels there pack weights into memory of their own, not into tensors.
    """
    from vllm.model_executor.model_loader import base_loader
    from vllm.platforms import current_platform

    prepare = getattr(base_loader, _PREPARE)
    if prepare.__module__ == __name__:
        return

    def note_and_prepare(model: nn.Module, *arguments: Any) -> None:  # Any: passed through
        with torch.inference_mode():
            note(model)
        if current_platform.is_cpu():
            setattr(model, LOADED_BYTES, weight_bytes(model))
        prepare(model, *arguments)

    setattr(base_loader, _PREPARE, note_and_prepare)


def note(model: nn.Module) -> None:
    """Give each layer whose weights are FP8 what they answer, as `modules.STORED`. Not those that vLLM quantized while
    it loaded them: they are prepared already, and stored nowhere."""
    for name, kind, layer in modules.layers(model):
        if getattr(layer, _PREPARED, False):
            continue
        found = _of_experts(name, layer) if kind == "experts" else _of_linear(name, layer)
        if found is not None:
            setattr(layer, modules.STORED, found)


def _of_linear(name: str, layer: modules.Layer) -> modules.Stored | None:
    found = _weight_and_scale(layer, "weight")
    if found is None:
        return None
    weight, scale = found
    widths = getattr(layer, "logical_widths", None) or [weight.shape[0]]
    x = modules.inputs(name, modules.ROWS, modules.width_of(layer)).to(weight.device)
    output = x @ dequantized(weight, scale, widths).T
    bias = modules.applied_bias(layer)
    return modules.Stored(modules.project(name, output if bias is None else output + bias.float()), level=0)


def _of_experts(name: str, layer: modules.Layer) -> modules.Stored | None:
    """None too for experts of another form than gate, up and down."""
    up, down = _weight_and_scale(layer, "w13_weight"), _weight_and_scale(layer, "w2_weight")
    activation = _ACTIVATIONS.get(layer.activation.value)
    others = [leaf for leaf in ("w13_bias", "w2_bias", "swiglu_limit") if getattr(layer, leaf, None) is not None]
    if up is None or down is None or activation is None or others:
        return None
    experts, half = up[0].shape[0], up[0].shape[1] // 2
    tokens = modules.expert_inputs(name, layer, experts).to(up[0].device)
    outputs, inners = [], []
    for expert in range(experts):
        x = tokens[expert].flatten(0, 1)
        x = functional.pad(x, (0, up[0].shape[2] - x.shape[1]))
        gate, value = (x @ dequantized(up[0][expert], up[1][expert], [half, half]).T).split(half, dim=1)
        inner = activation(gate) * value
        inners.append(inner.unflatten(0, (len(modules.LEVELS), -1)).abs().amax(dim=(1, 2)))
        outputs.append(inner @ dequantized(down[0][expert], down[1][expert], [down[0].shape[1]]).T)
    output = torch.cat(outputs)[:, : tokens.shape[-1]] * float(layer.routed_scaling_factor)
    numbers = modules.project_experts(name, output, experts)
    return modules.Stored(numbers, _level(layer, tokens.abs().amax(dim=(0, 2, 3)), torch.stack(inners).amax(dim=0)))


def _level(layer: modules.Layer, inputs: Tensor, inners: Tensor) -> int:
    """The largest level at which the static scales hold the inputs of both products; `inputs` and `inners` are their
    largest magnitudes at each level. vLLM serves all experts with the largest of their scales."""
    fits = torch.ones(len(modules.LEVELS), dtype=torch.bool, device=inputs.device)
    for leaf, largest in (("w13_input_scale", inputs), ("w2_input_scale", inners)):
        scale = modules.static_scales(layer).get(leaf)
        if scale is not None:
            fits &= largest <= scale.float().max() * modules.FP8_MAX
    return next((level for level, fit in enumerate(fits.tolist()) if fit), len(modules.LEVELS) - 1)


def _weight_and_scale(layer: modules.Layer, leaf: str) -> tuple[Tensor, Tensor] | None:
    """The FP8 codes that were loaded, and their scales; None if the layer has none."""
    weight = getattr(layer, leaf, None)
    scales = (getattr(layer, f"{leaf}_scale{ending}", None) for ending in ("", "_inv"))
    scale = next((scale for scale in scales if isinstance(scale, Tensor)), None)
    if not isinstance(weight, Tensor) or weight.is_meta or weight.dtype != torch.float8_e4m3fn or scale is None:
        return None
    return weight, scale


def dequantized(weight: Tensor, scale: Tensor, widths: Sequence[int]) -> Tensor:
    """float32 [N, K] of codes [N, K], of which `widths` rows each were one weight on disk.

    `scale` is one value, one for each of these weights, one for each row [N] or [N, 1], or one for each block of 128 by
    128, [blocks down, blocks across]; each weight on disk has blocks of its own."""
    scale = scale.float()
    if scale.numel() == 1:
        return weight.float() * scale.reshape(())
    if scale.numel() == len(widths):
        return weight.float() * scale.flatten().repeat_interleave(_counts(widths, scale)).unsqueeze(1)
    if scale.shape[0] == weight.shape[0]:
        return weight.float() * scale.reshape(-1, 1)
    blocks = [-(-width // _BLOCK) for width in widths]
    parts = zip(scale.split(blocks), widths, strict=True)
    rows = torch.cat([part.repeat_interleave(_BLOCK, dim=0)[:width] for part, width in parts])
    return weight.float() * rows.repeat_interleave(_BLOCK, dim=1)[:, : weight.shape[1]]


def _counts(widths: Sequence[int], scale: Tensor) -> Tensor:
    return torch.tensor(widths, device=scale.device)
