"""What calibration found about each Linear: the worst of them, and those that a recipe keeps in BF16.

In: the figures of a Calibration. Out: groups of Linears in order of output SQNR, worst first. What vLLM fuses is one
group (q, k and v; gate and up; all experts of a layer), because it must have one precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fp8pipe.config import KeepRule

if TYPE_CHECKING:
    from fp8pipe.model.architecture import Architecture
    from fp8pipe.quantize.plan import Plan
    from fp8pipe.records.calibration import Calibration, Sensitivity


def worst_modules(calibration: Calibration, count: int = 10) -> list[tuple[str, Sensitivity]]:
    """The `count` Linears with the least output SQNR, worst first."""
    known = [(name, one) for name, one in calibration.sensitivity.items() if one.output_sqnr_db is not None]
    return sorted(known, key=lambda item: (item[1].output_sqnr_db, item[0]))[:count]


def kept_by(
    rule: KeepRule | None, plan: Plan, architecture: Architecture, found: Mapping[str, Sensitivity]
) -> dict[str, str]:
    """Source tensors that `rule` keeps -> why.

    Groups are taken worst first until they hold the rule's share of the Linears, rounded up. A group is as bad as its
    worst projection.
    """
    from fp8pipe.calibrate.targets import units_of

    if rule is None:
        return {}
    units = units_of(plan, architecture)
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


def _sqnr_of(members: Mapping[str, Sensitivity]) -> float | None:
    """Output SQNR of the worst projection of a group; one projection of all experts counts as one."""
    from fp8pipe.calibrate.noise import together

    projections: dict[str, list[Sensitivity]] = {}
    for name, one in members.items():
        projections.setdefault(name.rpartition(".")[2], []).append(one)
    found = [together((one.output_energy, one.output_sqnr_db) for one in same) for same in projections.values()]
    return min((db for db in found if db is not None), default=None)
