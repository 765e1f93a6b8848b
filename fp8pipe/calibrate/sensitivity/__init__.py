"""What FP8 costs each Linear: the most sensitive ones, and those that a recipe's keep_bf16 keeps.

    sampling   some rows of each weight, some tokens of each input
    rounding   weights and inputs as FP8 has them
    figures    SQNR, saturation and kurtosis of one Linear

Calibration measures the figures while a layer is in memory; here they are ranked. What vLLM fuses is one group (q, k
and v; gate and up; all experts of a layer), because it must have one precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fp8pipe.config import KeepRule

if TYPE_CHECKING:
    from fp8pipe.model.architecture import Architecture
    from fp8pipe.quantize.plan import OutputTensor, Plan
    from fp8pipe.records.calibration import Calibration, Sensitivity


def worst_modules(calibration: Calibration, count: int = 10) -> list[tuple[str, Sensitivity]]:
    """The `count` Linears with the lowest output SQNR, worst first."""
    known = [(name, one) for name, one in calibration.sensitivity.items() if one.output_sqnr_db is not None]
    return sorted(known, key=lambda item: (item[1].output_sqnr_db, item[0]))[:count]


def kept_by(
    rule: KeepRule | None, plan: Plan, architecture: Architecture, found: Mapping[str, Sensitivity]
) -> dict[str, str]:
    """Source tensors that `rule` keeps -> why.

    Groups are taken worst first until they hold the rule's share of the Linears, rounded up. A group is as bad as its
    worst projection.
    """
    if rule is None:
        return {}
    units = _units(plan, architecture)
    modules = {unit: [output.module for output in outputs] for unit, outputs in units.items()}
    sqnr = {unit: _sqnr_of({name: found[name] for name in names if name in found}) for unit, names in modules.items()}
    ranked = sorted((db, unit) for unit, db in sqnr.items() if db is not None)
    budget = math.ceil(round(rule.worst * sum(map(len, units.values())), 6))
    kept: dict[str, str] = {}
    taken = 0
    for db, unit in ranked:
        if taken >= budget:
            break
        taken += len(units[unit])
        reason = f"keep_bf16: among the worst {100 * rule.worst:g} % of Linears, output SQNR {db:.1f} dB in FP8"
        kept |= dict.fromkeys((output.source for output in units[unit]), reason)
    return kept


def _units(plan: Plan, architecture: Architecture) -> dict[str, list[OutputTensor]]:
    """Weights that must have one precision: what vLLM fuses, all experts of a layer, or one alone."""
    from fp8pipe.quantize.plan.choose import experts_holder

    units: dict[str, list[OutputTensor]] = {}
    for output in plan.outputs:
        if output.role == "weight":
            role = architecture.tensors[output.source]
            is_expert = role.kind in {"expert", "fused_experts"}
            unit = experts_holder(output.source, role) if is_expert else output.group or output.module
            units.setdefault(unit, []).append(output)
    return units


def _sqnr_of(members: Mapping[str, Sensitivity]) -> float | None:
    """Output SQNR of a group's worst projection; the same projection of all experts counts as one."""
    from fp8pipe.calibrate.sensitivity.figures import together

    projections: dict[str, list[Sensitivity]] = {}
    for name, one in members.items():
        projections.setdefault(name.rpartition(".")[2], []).append(one)
    found = [together((one.output_energy, one.output_sqnr_db) for one in same) for same in projections.values()]
    return min((db for db in found if db is not None), default=None)
