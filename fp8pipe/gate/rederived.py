"""Does a decision follow from the reports and the policy that it names? It is made again from their samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fp8pipe.config import EvalSuite, GatePolicy, Recipe
from fp8pipe.gate.decision import decide
from fp8pipe.records import Checkpoint, EvalReport, GateDecision

_CLOSE = 1e-9
"""Relative; another processor may add floating-point numbers in another order."""


def departures(
    decision: GateDecision,
    baseline: EvalReport,
    candidate: EvalReport,
    policy: GatePolicy,
    *,
    checkpoint: Checkpoint,
    suite: EvalSuite | None,
    recipe: Recipe,
) -> list[str]:
    """Each field of `decision` in which it differs from the one that this evidence gives, as `field: says x, is y`.

    What no evidence is left of is taken from the decision: the earlier attempts of a ladder, and which look it was.
    """
    attempt, attempts, look = decision.attempt, decision.max_attempts, decision.look
    if not (1 <= attempt == len(decision.earlier) + 1 <= attempts <= policy.max_attempts):
        listed = f"attempt {attempt} of {attempts} after {len(decision.earlier)} others"
        return [f"{listed}, under a policy with max_attempts {policy.max_attempts}"]
    if not 1 <= look <= len(policy.looks):
        return [f"look {look} of a policy with {len(policy.looks)}"]
    again = decide(
        baseline,
        candidate,
        policy,
        checkpoint=checkpoint,
        suite=suite,
        recipe=recipe,
        attempt=attempt,
        attempts=attempts,
        look=look,
        earlier=decision.earlier,
    )
    return list(_differences("", decision.model_dump(), again.model_dump()))


def _differences(where: str, says: Any, found: Any) -> Iterator[str]:  # Any: the fields of a record
    if isinstance(says, dict) and isinstance(found, dict) and says.keys() == found.keys():
        for name in says:
            yield from _differences(f"{where}.{name}" if where else name, says[name], found[name])
    elif isinstance(says, tuple | list) and isinstance(found, tuple | list) and len(says) == len(found):
        for place, pair in enumerate(zip(says, found, strict=True)):
            yield from _differences(f"{where}[{place}]", *pair)
    elif not _is_same(says, found):
        yield f"{where}: says {_short(says)}, is {_short(found)}"


def _is_same(says: object, found: object) -> bool:
    if isinstance(says, float) and isinstance(found, float):
        return math.isclose(says, found, rel_tol=_CLOSE, abs_tol=1e-12) or (math.isnan(says) and math.isnan(found))
    return says == found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
