"""What vLLM makes of FP8 blocks at load when DeepGEMM is to serve them; also a child process.

    python vllm_requantizes.py FOLDER

Prints, as JSON, for every weight of a checkpoint in blocks of 128: the largest change of a weight.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fp8pipe.quantize.numerics import dequantize

BLOCK = (128, 128)


def requantized(codes: Tensor, scale: Tensor) -> Tensor:
    """The weights that vLLM's own `requant_weight_ue8m0_inplace` leaves of these codes [out, in], float32."""
    from vllm.model_executor.layers.quantization.utils.fp8_utils import requant_weight_ue8m0_inplace

    codes, scale = codes.clone(), scale.clone()
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than the work
        requant_weight_ue8m0_inplace(codes, scale, BLOCK)
    return dequantize(codes, scale, block=BLOCK)


def main() -> None:
    changes = {}
    for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        tensors = load_file(path)
        for name, codes in tensors.items():
            if codes.dtype == torch.float8_e4m3fn:
                scale = tensors.get(f"{name}_scale", tensors.get(f"{name}_scale_inv"))
                assert scale is not None, name
                change = requantized(codes, scale) - dequantize(codes, scale, block=BLOCK)
                changes[name] = float(change.abs().max())
    print(json.dumps(changes))


if __name__ == "__main__":
    main()
