"""How transformers serves a checkpoint.

transformers 5.19, quantizers/quantizer_compressed_tensors.py and quantizer_finegrained_fp8.py.
"""

from __future__ import annotations

from fp8pipe.records.serving import Verdict
from fp8pipe.validate.serving.facts import Facts


def transformers_serves(facts: Facts, ranks: int) -> tuple[Verdict, str, str]:
    """(verdict, word, reason), the same on all devices."""
    if facts.method == "fp8" and facts.spec.strategy != "block":
        # FP8Linear of integrations/finegrained_fp8.py has weight_scale_inv and activation_scale
        return (
            "no",
            "no",
            "transformers does not read `weight_scale` and multiplies by unscaled codes, without an error",
        )
    if ranks > 1:
        return (
            "unknown",
            "?",
            "transformers has no tensor-parallel plan for scales; vLLM is what serves on several GPUs",
        )
    if facts.method == "fp8":
        return "w8a8", "W8A8", ""
    # CompressedTensorsHfQuantizer without use_optimized_inference: compressed-tensors decompresses the weights before
    # the first forward pass, and its `quantized_forward` rounds the inputs of Linears. Experts are plain parameters.
    return (
        "otherwise",
        "16 bits",
        "transformers multiplies in 16 bits; it rounds the inputs of Linears, not of experts, to FP8 and back",
    )
