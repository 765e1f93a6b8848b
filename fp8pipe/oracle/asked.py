"""The names under which vLLM's layers ask for a quantization method, noted while vLLM builds a model.

An ignore list is matched against these names and no others. They differ from the names on disk and in transformers, and
from the modules' own names in vLLM: q_proj, k_proj and v_proj ask together, as qkv_proj.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Asked = dict["nn.Module", str]
"""Layer -> the name under which it asked."""


@contextlib.contextmanager
def noted(quant_config: Any, asked: Asked) -> Iterator[None]:  # Any: vLLM's config class of one method, or None
    """Inside the context, adds every layer that asks `quant_config` for a method to `asked`. vLLM copies these configs
    while it builds a model, so the class is watched, not the object."""
    if quant_config is None:
        yield
        return
    kind = type(quant_config)
    answer = kind.get_quant_method

    def note(self: Any, layer: nn.Module, prefix: str) -> Any:
        asked[layer] = prefix
        return answer(self, layer, prefix)

    kind.get_quant_method = note
    try:
        yield
    finally:
        kind.get_quant_method = answer


def by_module(model: nn.Module, asked: Asked) -> dict[str, str]:
    """Name of a module in vLLM's model -> the name under which it asked."""
    return {name: asked[module] for name, module in model.named_modules(remove_duplicate=False) if module in asked}
