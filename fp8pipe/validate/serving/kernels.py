"""What vLLM computes with: which kernel it chooses on a device, and whether that uses the checkpoint's numbers.

vLLM 0.32 on CUDA as released, with the packages that its wheel brings (FlashInfer, DeepGEMM) and no setting changed.
Linears: the first kernel of `_POSSIBLE_FP8_KERNELS`, `_POSSIBLE_FP8_BLOCK_KERNELS` or `_POSSIBLE_WFP8A16_KERNELS`
(vllm/model_executor/kernels/linear) that serves device and shape. Experts: `select_fp8_moe_backend`
(layers/fused_moe/oracle/fp8.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from fp8pipe.records.serving import DeviceClass
from fp8pipe.validate.serving.facts import Facts
from fp8pipe.validate.serving.shards import local_shape

CAPABILITY: dict[DeviceClass, int] = {"ada": 89, "hopper": 90, "blackwell": 100}

_SERVED_BLOCK = (128, 128)
_DEEPGEMM = (64, 128)
"""Rows and columns of a rank's matrix are multiples of these: `should_use_deepgemm_for_fp8_linear`."""
_NOT_ON_BLACKWELL = frozenset(("qwen3_5_text", "qwen3_5_moe_text"))
"""Model types for which vLLM leaves DeepGEMM out on Blackwell: `_DEEPGEMM_BLACKWELL_EXCLUDED_MODEL_TYPES`."""

MARLIN = "vLLM's Marlin kernel multiplies FP8 weights by 16-bit inputs"
REQUANTIZED = (
    "DeepGEMM rounds the block scales up to powers of two and quantizes the weights again (28.5 dB instead of 31.6)"
)


@dataclass(frozen=True, slots=True)
class Effect:
    """What becomes of the numbers."""

    word: str
    reason: str
    counts: bool = True
    """The kernel is of the kind that the scheme asks for."""


def effect(facts: Facts, device: DeviceClass, ranks: int) -> Effect | None:
    """What vLLM computes otherwise than the checkpoint says, on GPUs of this class; None if nothing.

    Experts are served as W8A8 by all three classes: in blocks by Triton, FlashInfer's Cutlass or TRT-LLM, which read
    the scales as they are; else by Triton, Cutlass or FlashInfer.
    """
    if facts.spec.inputs is None:
        return Effect("W8A16", f"{MARLIN}, as the checkpoint asks")
    if facts.spec.strategy != "block" or not any(matrix.quantized for matrix in facts.matrices):
        return None
    kernels = {linear_kernel(facts, device, local_shape(m, ranks)) for m in facts.matrices if m.quantized}
    if "marlin" in kernels:
        beside = "; experts stay W8A8" if any(experts.quantized for experts in facts.experts) else ""
        return Effect("W8A16", f"{MARLIN}{beside}", counts=False)
    if "deepgemm" in kernels and not facts.powers_of_two:
        return Effect("requantized", REQUANTIZED)
    return None


def partial_group(facts: Facts, device: DeviceClass) -> str:
    """Why vLLM stops at the first token: it quantizes the inputs of Linears in blocks by whole groups
    (`per_token_group_quant_fp8` in fp8_utils.py), except for Marlin, which takes them as they are. Empty if not."""
    if facts.spec.inputs is None or facts.spec.strategy != "block" or device == "ada":
        return ""
    group = _SERVED_BLOCK[1]
    cut = next((matrix for matrix in facts.matrices if matrix.quantized and matrix.columns % group), None)
    return f"{cut.name}: {cut.columns} inputs are not whole groups of {group}" if cut is not None else ""


def serves_block(block: tuple[int, int] | None) -> bool:
    """Whether vLLM has a kernel for weights in such blocks."""
    return block in (None, _SERVED_BLOCK)


def linear_kernel(facts: Facts, device: DeviceClass, shape: tuple[int, int]) -> str:
    """The kernel of a Linear in blocks of 128 x 128, [out, in] on one rank: deepgemm, cutlass or marlin.

    FlashInferFp8DeepGEMMDynamicBlockScaledKernel (Hopper) and DeepGemmFp8BlockScaledMMKernel both multiply with
    DeepGEMM's weights, so one word stands for both.
    """
    if device == "ada":  # CutlassFp8BlockScaledMMKernel begins at 9.0, and Marlin comes before Triton in the list
        return "marlin"
    excluded = device == "blackwell" and facts.model_type in _NOT_ON_BLACKWELL
    fits = shape[0] % _DEEPGEMM[0] == 0 and shape[1] % _DEEPGEMM[1] == 0
    return "deepgemm" if fits and not excluded and not facts.half else "cutlass"
