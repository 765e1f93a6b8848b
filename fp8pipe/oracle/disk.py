"""Where transformers loads each tensor on disk: its own loader's rules, applied to names alone.

All renamings come first, then at most one converter, then the base model's prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


class Unsupported(Exception):
    """This model cannot be quantized, for the reason in the message."""


class Target:
    """Where transformers loads a tensor: its parameter, and the converter that splits or changes it, if any."""

    def __init__(self, name: str, converter: WeightConverter | None, pattern: str | None = None) -> None:
        self.name = name
        self.converter = converter
        self.pattern = pattern
        """Which of the converter's source patterns the tensor matches."""

    def all_names(self) -> list[str]:
        """All parameters that the tensor fills: `name`, and one per further target pattern of the converter."""
        if self.converter is None:
            return [self.name]
        first, *others = self.converter.target_patterns
        return [self.name, *(self.name.replace(first, other) for other in others)]


def follow(model: PreTrainedModel, names: Mapping[str, Any]) -> dict[str, Target]:
    """Every name on disk that transformers would load -> its target in the model."""
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    targets = {}
    for name in sorted(names, key=dot_natural_key):  # the loader's order, on which some renamings depend
        place, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if place not in state and name in state:
            place, pattern = rename_source_key(name, [], [], prefix, state)
        if place in state:
            targets[name] = Target(place, by_pattern[pattern] if pattern is not None else None, pattern)
    return targets
