"""What a validation looks at: checkpoint, source, config, what is known of the architecture, what was measured.

In: the readings of the other rooms. Out: one `Subject` that every check receives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fp8pipe.model.headers import TensorInfo
from fp8pipe.validate.layout import WEIGHTS, expert_of, split_name
from fp8pipe.validate.shelf import Shelf

if TYPE_CHECKING:
    from fp8pipe.oracle.vllm import Mismatch
    from fp8pipe.validate.evidence import Evidence
    from fp8pipe.validate.findings import Need
    from fp8pipe.validate.layout import Layout
    from fp8pipe.validate.measure import Measured
    from fp8pipe.validate.scheme import Scheme, Spec


@dataclass
class Subject:
    """One checkpoint under validation."""

    shelf: Shelf
    config: dict[str, Any] | None
    """config.json; None when it does not parse (C1 says so)."""
    config_problem: str | None
    quantization: dict[str, Any] | None
    """The quantization_config that vLLM reads; None when there is none."""
    quantization_file: str
    """Where it stands."""
    scheme: Scheme | None
    """What it means; None when it is not understood (C1 to C4 say why)."""
    layout: Layout | None
    """Which tensors play which part; None without a config."""
    source: Shelf | None = None
    source_config: dict[str, Any] | None = None
    source_commit: str | None = None
    evidence: Evidence | None = None
    """Records of the engine beside the checkpoint; None for checkpoints of other tools."""
    vllm: tuple[Mismatch, ...] | None = None
    """Where vLLM's own loader and the checkpoint disagree; None when it was not asked."""
    measured: Measured | None = None
    """What the pass over the data saw; None until it ran."""

    def supplies(self, need: Need) -> bool:
        """Whether a check that needs `need` can run."""
        return {
            "config": self.config is not None,
            "scheme": self.scheme is not None and self.layout is not None,
            "source": self.source is not None,
            "records": self.evidence is not None and self.evidence.plan is not None,
            "calibration": self.evidence is not None and self.evidence.calibration is not None,
            "vllm": self.vllm is not None,
            "manifest": self.evidence is not None and self.evidence.manifest is not None,
        }[need]

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Modules that the config says are quantized, by name on disk, and how."""
        if self.scheme is None or self.layout is None:
            return {}
        found = {name: self.scheme.spec_of(name) for name in self.layout.quantizable}
        return {name: spec for name, spec in found.items() if spec is not None}

    def weight(self, module: str) -> TensorInfo | None:
        """The weight of a module as it is stored: under the name that its scheme asks for, else under any."""
        spec = self.specs.get(module)
        leaves = (spec.weight, *WEIGHTS) if spec else WEIGHTS
        return next((found for leaf in leaves if (found := self.shelf.tensors.get(f"{module}.{leaf}"))), None)

    def quantized_weights(self) -> Iterator[tuple[str, TensorInfo, Spec]]:
        """(module, weight, how it must be stored) of what is quantized by config and present."""
        for module, spec in sorted(self.specs.items()):
            if (entry := self.shelf.tensors.get(f"{module}.{spec.weight}")) is not None:
                yield module, entry, spec

    def spec_of_weight(self, entry: TensorInfo) -> Spec | None:
        """How the tensor must be stored if it is a quantized weight; None for all others."""
        module, leaf = split_name(entry.name)
        spec = self.specs.get(module)
        return spec if spec is not None and leaf == spec.weight else None

    def source_shape(self, module: str) -> tuple[int, ...] | None:
        """Shape [out, in] of a module's weight in the source, None where it is not known."""
        piece = self.layout.pieces.get(module) if self.layout else None
        if piece is not None:
            return piece.rows, piece.columns
        twin = self.source.tensors.get(f"{module}.weight") if self.source else None
        return twin.shape if twin is not None else None

    def is_counted_expert(self, module: str) -> bool:
        """An expert of a model whose number of experts is known: K6 speaks of what it lacks."""
        return expert_of(module) is not None and self.layout is not None and self.layout.num_experts is not None
