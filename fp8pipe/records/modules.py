"""What every Linear and expert layer of the engine's model answered to its seeded input."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Literal

from fp8pipe.records.base import Record

if TYPE_CHECKING:
    import numpy as np


PROOF_VERSION = 1
"""Increase it when a layer's input or projection changes: proofs of two versions cannot be compared."""


class ModuleOutput(Record):
    """One layer of vLLM's model on one worker, run through its own kernel (`fp8pipe.evaluate.modules`)."""

    name: str
    """vLLM's own."""
    rank: int
    """Position of the worker among the engine's workers: each holds its own part of the layer."""
    kind: Literal["linear", "experts"]
    scheme: str
    """Scheme and kernel that serve it, by the names of vLLM's classes; empty if it is served unquantized."""
    static: bool = False
    """Whether its inputs have static scales."""
    shape: tuple[int, ...] = ()
    """(experts, levels, numbers) of `outputs`; a Linear has one expert and one level."""
    level: int = 0
    """The level at which the layer is to be compared: the largest that its static scales hold."""
    outputs: str = ""
    """A random projection of the layer's outputs: bfloat16, little-endian, in base64. Empty with a fault; or if the
    engine took the layer's weights into another product and does not run it."""
    stored_error: float | None = None
    """Relative error of the outputs against those of the weights and scales as they were loaded, in float32. None if
    the layer is not quantized, or its weights were not seen before the engine prepared them."""
    fault: str = ""
    """Why the layer could not be run, or is not to be relied on; empty if nothing is wrong."""

    def numbers(self) -> np.ndarray:
        """The projection as float32 [experts, levels, numbers]."""
        import numpy as np

        halves = np.frombuffer(base64.b64decode(self.outputs), dtype="<u2").astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(self.shape)


class ModuleProof(Record):
    """Every Linear and expert layer of the engine's model, before its first prompt."""

    version: int
    modules: tuple[ModuleOutput, ...]
