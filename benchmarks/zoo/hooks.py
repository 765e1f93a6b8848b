"""Static ranges against plain hooks on the whole model, run at once.

In: the source model, the calibration and its token ids. Out: how far each range is from the largest value that went
into the matrix product. The products themselves are watched, by the memory that their weights lie in, so that this
knows no architecture: a Linear's own weight, or one expert's slice of a 3-D parameter. Keys and values are watched in
the cache.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

from fp8pipe.model.architecture import Architecture
from fp8pipe.oracle.loaded_probe import Side
from fp8pipe.records.calibration import Calibration

_PRODUCTS = frozenset(
    (F.linear, torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm)
)

Place = tuple[str, int]
"""Parameter and expert; 0 for a Linear."""


@dataclass(frozen=True)
class Compared:
    """Ranges beside plain hooks."""

    inputs: int = 0
    """How many inputs of Linears and experts were compared."""
    input_error: float = 0.0
    """Largest relative difference."""
    kv: int = 0
    """How many ranges of keys and values."""
    kv_error: float = 0.0
    worst: str = ""
    unseen: tuple[str, ...] = ()
    """Modules with a range whose product no hook saw."""


class Products(TorchFunctionMode):
    """Records the largest input of every product with a watched weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: dict[Place, float] = {}
        self._places: dict[int, Place] = {}
        self._stacked: set[str] = set()
        for name, parameter in model.named_parameters():
            self._stacked |= {name} if parameter.dim() == 3 else set()
            count = parameter.shape[0] if parameter.dim() == 3 else 1
            step = parameter.numel() // count * parameter.element_size()
            self._places |= {parameter.data_ptr() + step * index: (name, index) for index in range(count)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            self._note(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _note(self, values: Tensor, weight: Tensor) -> None:
        place = self._places.get(weight.data_ptr())
        if place is None or not values.numel():
            return
        count = weight.shape[0] if weight.dim() == 3 else 1  # all experts at once, each with a row of its own
        parts = values if count > 1 else [values]
        for index, part in enumerate(parts):
            where = (place[0], place[1] + index if place[0] in self._stacked else 0)  # a Linear may run in groups
            self.seen[where] = max(self.seen.get(where, 0.0), float(part.abs().max()))


class RecordingCache(DynamicCache):
    """Records the largest key and value of each layer."""

    def __init__(self, config: Any, seen: dict[int, list[float]]) -> None:
        super().__init__(config=config)
        self._seen = seen

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        found = self._seen.setdefault(layer_idx, [0.0, 0.0])
        for index, states in enumerate((key_states, value_states)):
            found[index] = max(found[index], float(states.abs().max()))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    calibration: Calibration,
    architecture: Architecture,
    ours: Side,
    token_ids: Sequence[Sequence[int]],
    origins: Mapping[str, str],
) -> Compared:
    """Run every sample through the whole model; raises whatever the model raises. origins: module of the checkpoint ->
    the source's tensor that its weight is made from."""
    runs = _without_sight(model)
    for part in (model, runs):
        if part._can_set_experts_implementation():
            part.set_experts_implementation("eager")
    kv: dict[int, list[float]] = {}
    with Products(model) as products:
        for sample in token_ids:
            cache = RecordingCache(model.config.get_text_config(decoder=True), kv)
            runs(input_ids=torch.tensor([list(sample)]), past_key_values=cache, use_cache=True)
    assumed = {scale.removesuffix(".input_scale") for scale in calibration.assumed}
    measured = {name: amax for name, amax in calibration.inputs.items() if name not in assumed}
    places = {name: place_of(name, ours, origins) for name in measured}
    pairs = {name: (amax, products.seen.get(places[name])) for name, amax in measured.items()}
    errors = {name: _apart(ours_, theirs) for name, (ours_, theirs) in pairs.items() if theirs is not None}
    kv_errors = _kv_errors(model, calibration, architecture, kv)
    every = errors | kv_errors
    return Compared(
        inputs=len(errors),
        input_error=max(errors.values(), default=0.0),
        kv=2 * len(kv_errors),
        kv_error=max(kv_errors.values(), default=0.0),
        worst=max(every, key=lambda name: every[name]) if every else "",
        unseen=tuple(name for name, (_, theirs) in pairs.items() if theirs is None),
    )


def _without_sight(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or the text decoder of one that sees, whose own forward masks and embeds what is not text."""
    return model.get_decoder() if "pixel_values" in inspect.signature(model.forward).parameters else model


def place_of(module: str, side: Side, origins: Mapping[str, str]) -> Place:
    """Where transformers' loader puts the weight of a module, by its name in the checkpoint or in the source."""
    name = f"{module}.weight"
    expert = int(numbers[-1]) if (numbers := re.findall(r"\.(\d+)\.", name)) else 0
    for place, members in side.stacks.items():
        if name in members:
            return place, expert
    if name not in side.targets:
        name = origins.get(module, "")
    if name not in side.targets:
        return "", 0
    place = side.targets[name].name
    return place, expert if len(side.shape(place)) == 3 else 0


def _kv_errors(
    model: PreTrainedModel, calibration: Calibration, architecture: Architecture, seen: dict[int, list[float]]
) -> dict[str, float]:
    errors = {}
    for layer in architecture.attention:
        index = vars(model.get_submodule(layer.module)).get("layer_idx")
        if layer.name in calibration.kv and not layer.lender and index in seen:
            found = calibration.kv[layer.name]
            keys, values = seen[index]
            errors[layer.name] = max(_apart(max(found.k_amax), keys), _apart(max(found.v_amax), values))
    return errors


def _apart(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / theirs if theirs else float(ours != 0)
