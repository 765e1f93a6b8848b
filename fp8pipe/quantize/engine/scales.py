"""Turns the ranges of a calibration into the scales of the plan: input_scale, k_scale, v_scale.

scale = max(amax, 1e-12) / 448, float32. A fused group has one input_scale, from the largest amax of its members. A
missing range is an error; none is made up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from fp8pipe.errors import InputError
from fp8pipe.quantize.kernels import scale_of
from fp8pipe.quantize.plan import OutputTensor, Plan
from fp8pipe.records.calibration import Calibration


def calibrated_scales(plan: Plan, calibration: Calibration | None) -> dict[str, bytes]:
    """Bytes of every calibrated scale, by output name.

    Raises InputError if there is no calibration, if it belongs to another source or plan, or if a range is missing or
    unusable."""
    _refuse_unsettled(plan, calibration)
    wanted = [output for output in plan.outputs if output.role in {"input_scale", "k_scale", "v_scale"}]
    if not wanted:
        return {}
    if calibration is None:
        raise InputError(f"recipe {plan.recipe} needs calibrated ranges for {len(wanted)} scales; run calibrate first")
    if calibration.source_commit != plan.source_commit:
        raise InputError(
            f"the calibration was made for source {calibration.source_commit[:16]}, the plan for "
            f"{plan.source_commit[:16]}; calibrate again"
        )
    amax = _input_amax(plan, calibration.inputs) | _kv_amax(plan, calibration)
    _refuse_unusable(amax, wanted)
    return {output.name: _scale_bytes(amax[output.name], output) for output in wanted}


def _refuse_unsettled(plan: Plan, calibration: Calibration | None) -> None:
    """Raise InputError unless a plan with keep_bf16 keeps what its calibration found too sensitive."""
    if plan.settings.keep_bf16 is None:
        return
    if calibration is None:
        raise InputError(f"recipe {plan.recipe} has keep_bf16, which needs a calibration; run calibrate first")
    quantized = {output.source for output in plan.outputs if output.role == "weight"}
    if left := sorted(quantized & calibration.kept.keys()):
        raise InputError(
            f"{left[0]}: the plan quantizes it, the calibration keeps it; plan again with what the calibration keeps"
        )


def _input_amax(plan: Plan, inputs: Mapping[str, float]) -> dict[str, tuple[float, ...]]:
    outputs = [output for output in plan.outputs if output.role == "input_scale"]
    groups: dict[str, list[float]] = {}
    for output in outputs:
        groups.setdefault(output.group or output.module, []).append(inputs.get(output.module, math.nan))
    return {output.name: (_largest(groups[output.group or output.module]),) for output in outputs}


def _largest(values: Iterable[float]) -> float:
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _kv_amax(plan: Plan, calibration: Calibration) -> dict[str, tuple[float, ...]]:
    found = {}
    for output in plan.outputs:
        if output.role in {"k_scale", "v_scale"}:
            ranges = calibration.kv.get(output.source)
            amax = {"k_scale": ranges.k_amax, "v_scale": ranges.v_amax} if ranges else {}
            found[output.name] = amax.get(output.role, ())
    return found


def refuse_impossible(calibration: Calibration | None) -> None:
    """Raise InputError unless every range of the calibration is finite and not negative."""
    if calibration is None:
        return
    ranges = {name: (amax,) for name, amax in calibration.inputs.items()}
    ranges |= {name: (amax,) for name, amax in calibration.weights.items()}
    ranges |= {name: (*found.k_amax, *found.v_amax) for name, found in calibration.kv.items()}
    bad = [name for name, values in ranges.items() if not all(math.isfinite(v) and v >= 0 for v in values)]
    if bad:
        raise InputError(f"the calibration has a range that is negative or not finite for {', '.join(bad[:3])}")


def _refuse_unusable(amax: Mapping[str, tuple[float, ...]], wanted: Iterable[OutputTensor]) -> None:
    bad = []
    for output in wanted:
        values, expected = amax[output.name], math.prod(output.shape)
        if len(values) != expected or any(math.isnan(value) for value in values):
            bad.append(f"{output.name} (expected {expected} ranges, found {list(values)[:4]})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise InputError(f"no usable range for {', '.join(bad[:3])}{more}; calibrate again with this plan")


def _scale_bytes(amax: tuple[float, ...], output: OutputTensor) -> bytes:
    assert len(amax) == math.prod(output.shape), output.name
    return scale_of(np.array(amax, np.float32)).tobytes()
