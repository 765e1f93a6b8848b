"""What a plan needs measured, with the names that transformers gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp8pipe.model.architecture import Architecture
    from fp8pipe.quantize.plan import OutputTensor, Plan

Place = tuple[str, int]
"""Parameter of an experts module (gate_up_proj, up_proj, down_proj) and index of the expert."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What to observe: name on disk -> name in transformers."""

    linears: Mapping[str, str]
    attention: Mapping[str, str]
    experts: Mapping[str, tuple[str, Place]] = field(default_factory=dict)
    """Projection of one expert, on disk -> experts module, and which input of it."""
    latent: Mapping[str, str] = field(default_factory=dict)
    """Attention without KV scales in vLLM (MLA); named in the result, not observed."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Module on disk -> what vLLM fuses it with, whose per-tensor weight scale it shares."""


def targets_of(plan: Plan, architecture: Architecture) -> Targets:
    """Every quantized Linear, and every attention that gets KV scales."""
    linears: dict[str, str] = {}
    experts: dict[str, tuple[str, Place]] = {}
    weights = [output for output in plan.outputs if output.role == "weight"]
    for output in weights:
        role = architecture.tensors[output.source]
        expert = role.expert if output.slice is None else output.slice.expert
        if expert is None:
            linears[output.module] = role.module
        else:
            experts[output.module] = role.module, (role.parameter, expert)
    wanted = set(plan.calibrated_attention())
    return Targets(
        linears=linears,
        experts=experts,
        attention={layer.name: layer.module for layer in architecture.attention if layer.name in wanted},
        latent={layer.name: layer.module for layer in architecture.attention if not layer.has_kv_scales},
        groups={output.module: output.group for output in weights if output.group},
    )


def units_of(plan: Plan, architecture: Architecture) -> dict[str, list[OutputTensor]]:
    """Weights that must have one precision: what vLLM fuses, all experts of a layer, or one alone."""
    from fp8pipe.model.names import EXPERT_KINDS, experts_holder

    units: dict[str, list[OutputTensor]] = {}
    for output in plan.outputs:
        if output.role == "weight":
            role = architecture.tensors[output.source]
            is_expert = role.kind in EXPERT_KINDS
            unit = experts_holder(output.source, role) if is_expert else output.group or output.module
            units.setdefault(unit, []).append(output)
    return units
