"""Ranges of the weights themselves, noted while calibration has their bytes: quantizing then reads each weight once.

A scale per tensor is known only when the whole tensor has been seen. The engine reads a weight twice for that, unless
the calibration that came before has already seen it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from torch import Tensor

from fp8pipe.quantize import numerics

if TYPE_CHECKING:
    from fp8pipe.quantize.plan import OutputTensor, Plan


class WeightRanges:
    """The weights of a plan whose ranges are worth keeping: those with one scale each, of a source that is not FP8.

    FP8 weights are dequantized in the model's dtype for calibration, in float32 for quantizing."""

    def __init__(self, plan: Plan) -> None:
        self._outputs: dict[str, list[OutputTensor]] = defaultdict(list)
        if plan.settings.weights.strategy != "tensor":
            return
        fp8 = {tensor.name for tensor in plan.tensors if tensor.scale}
        for output in plan.outputs:
            if output.role == "weight" and output.source not in fp8:
                self._outputs[output.source].append(output)

    def amax(self, source: str, tensor: Tensor) -> dict[str, float]:
        """Largest magnitude of each weight that is made from tensor `source`, by its name in the checkpoint.

        tensor: its values as they are on disk. A range that is not finite is left out: the engine measures that weight
        itself, and names the element."""
        found = {}
        for output in self._outputs.get(source, ()):
            weight = tensor
            if (part := output.slice) is not None:
                matrix = tensor[part.expert].T if part.transposed else tensor[part.expert]
                weight = matrix[part.start :: part.step][: output.shape[0]]
            found[output.name] = float(numerics.tensor_amax(weight))
        return {name: amax for name, amax in found.items() if math.isfinite(amax)}
