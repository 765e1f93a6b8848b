"""From what was seen to ranges: which are measured, which are taken instead, and which are refused.

In: the inputs, keys and values of one layer, as they were observed. Out: ranges by name on disk, and the scales whose
range was not measured, with the reason. A range of 0 gives no scale. It is refused, unless any scale would do as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fp8pipe.calibrate.observers import Observer
from fp8pipe.calibrate.sensitivity.sampling import Seen
from fp8pipe.calibrate.targets import LayerModules
from fp8pipe.errors import CalibrationDataError
from fp8pipe.model.names import experts_holder_from_name
from fp8pipe.quantize.numerics import E4M3_MAX
from fp8pipe.records.calibration import KVRange

Names = tuple[str, ...]
"""The modules on disk that read one input: gate and up read the same."""


def input_ranges(seen: Mapping[Names, Seen], layer: LayerModules) -> tuple[dict[str, float], dict[str, str]]:
    """Module -> range of its input; scale that was not measured -> why.

    vLLM serves all experts of a layer with the largest of their input scales. An expert whose input was always zero, or
    that saw no token, therefore gets the largest range of the others: it changes nothing. Experts of which none ran get
    no range. Raises CalibrationDataError for a range of 0 of any other module, and where most values are 0."""
    found: dict[str, float] = {}
    assumed: dict[str, str] = {}
    experts = _alike(layer)
    of_experts = {names for inputs in experts for names in inputs}
    for names, one in seen.items():
        if one.amax > 0 or names not in of_experts:
            _refuse_zero(f"{names[0]}: its input", (one.amax_to_cover,), (one.amax,))
            found |= dict.fromkeys(names, one.amax_to_cover)
    for inputs in experts:
        if seen.keys().isdisjoint(inputs):
            continue
        covered = [found[names[0]] for names in inputs if names[0] in found]
        instead = "the largest range of the others" if covered else "scale 1"
        for names in [names for names in inputs if names[0] not in found]:
            why = "every input of this expert was 0" if names in seen else "this expert saw no token"
            found |= dict.fromkeys(names, max(covered, default=E4M3_MAX))
            assumed |= {f"{name}.input_scale": f"{why}: {instead}" for name in names}
    return found, assumed


def kv_ranges(kv: Mapping[str, tuple[Observer, Observer]]) -> tuple[dict[str, KVRange], dict[str, str]]:
    """Attention -> ranges of its keys and values; scale that was not measured -> why.

    What was always zero gets scale 1, which vLLM's cache has without scales. Raises CalibrationDataError where most
    values are 0."""
    found: dict[str, KVRange] = {}
    assumed: dict[str, str] = {}
    for name, observers in kv.items():
        ranges = []
        for leaf, observer in zip(("k_scale", "v_scale"), observers, strict=True):
            amax = observer.amax()
            covered = tuple(r if a else E4M3_MAX for r, a in zip(observer.ranges(), amax, strict=True))
            _refuse_zero(f"{name}: what its {leaf} covers", covered, amax)
            ranges.append(covered)
            if not all(amax):
                assumed[f"{name}.{leaf}"] = "every value that it covers was 0: scale 1"
        found[name] = KVRange(k_amax=ranges[0], v_amax=ranges[1])
    return found, assumed


def _alike(layer: LayerModules) -> list[list[Names]]:
    """Inputs of experts that are of one kind: those of one parameter of an experts module, or of one projection of
    Linears that a model's own code keeps in a list `experts`."""
    found: dict[tuple[str, str], list[Names]] = {}
    for number, (_, names) in enumerate(layer.experts):
        for (parameter, _), on_disk in names.items():
            found.setdefault((str(number), parameter), []).append(tuple(on_disk))
    for name in layer.linears:
        holder = experts_holder_from_name(name)
        if holder is not None and name.removeprefix(f"{holder}.")[0].isdigit():
            found.setdefault((holder, name.rpartition(".")[2]), []).append((name,))
    return list(found.values())


def _refuse_zero(what: str, ranges: Sequence[float], amax: Sequence[float]) -> None:
    """Raise CalibrationDataError for a range of 0: a made-up one would clip the values that are served later."""
    if all(ranges):
        return
    unit = f" (head {ranges.index(0.0)})" if len(ranges) > 1 else ""
    reason = (
        "most of its values are 0; use the minmax observer, or a higher percentile"
        if amax[ranges.index(0.0)]
        else "every value was 0 on the calibration data; give other data, or add the module and what vLLM fuses with "
        "it to the recipe's ignore"
    )
    raise CalibrationDataError(f"{what}{unit} has a range of 0: {reason}")
