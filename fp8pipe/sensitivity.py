"""What calibration found about each Linear: the worst of them, and those that a recipe keeps in BF16.

In: the figures of a Calibration. Out: groups of Linears in order of output SQNR, worst first. What vLLM fuses is one
group (q, k and v; gate and up; all experts of a layer), because it must have one precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fp8pipe.config import KeepRule

if TYPE_CHECKING:
    from fp8pipe.architecture import Architecture
    from fp8pipe.calibrate import Calibration, Sensitivity
    from fp8pipe.plan import Plan


def worst_modules(calibration: Calibration, count: int = 10) -> list[tuple[str, Sensitivity]]:
    """The `count` Linears with the least output SQNR, worst first."""
    known = [(name, one) for name, one in calibration.sensitivity.items() if one.output_sqnr_db is not None]
    return sorted(known, key=lambda item: (item[1].output_sqnr_db, item[0]))[:count]


def kept_by(
    rule: KeepRule | None, plan: Plan, architecture: Architecture, found: Mapping[str, Sensitivity]
) -> dict[str, str]:
    """Source tensors that `rule` keeps -> why.

    Groups are taken worst first until they hold the rule's share of the Linears, rounded up.
    """
    from fp8pipe.calibrate.targets import units_of

    if rule is None:
        return {}
    units = units_of(plan, architecture)
    sqnr = {
        unit: _sqnr_of(found[output.module] for output in outputs if output.module in found)
        for unit, outputs in units.items()
    }
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


def _sqnr_of(members: Iterable[Sensitivity]) -> float | None:
    """Output SQNR of what is fused: the outputs side by side."""
    from fp8pipe.calibrate.noise import together

    return together((one.output_energy, one.output_sqnr_db) for one in members)
