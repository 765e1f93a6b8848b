"""The tensors of a conversion: the name, dtype and shape that each will have, and where its bytes are now."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fp8pipe.convert.record import Change, Method
from fp8pipe.model.headers import TensorInfo
from fp8pipe.model.names import FP8, experts_holder_from_name

_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared)$")
"""Modules whose matrix is looked up, not multiplied."""


@dataclass(frozen=True, slots=True)
class DraftTensor:
    """One tensor of the result."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def is_scalar(self) -> bool:
        return math.prod(self.shape) == 1


@dataclass(frozen=True)
class Draft:
    """All tensors of the result and its quantization_config."""

    method: Method
    tensors: tuple[DraftTensor, ...]
    quantization: dict[str, Any]
    config_changes: tuple[str, ...] = ()
    """What changes in quantization_config, one line each."""
    notes: tuple[str, ...] = ()
    """What readers do differently with the result."""

    @cached_property
    def quantized(self) -> dict[str, DraftTensor]:
        """Module -> its FP8 weight."""
        return {t.module: t for t in self.tensors if t.leaf == "weight" and t.dtype == FP8}

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """Modules whose matrix is not FP8, in the order of the files, without embeddings and experts."""
        return tuple(
            t.module for t in self._unquantized() if t.leaf == "weight" and experts_holder_from_name(t.name) is None
        )

    @cached_property
    def kept_experts(self) -> tuple[str, ...]:
        """Modules that hold unquantized experts."""
        return tuple(dict.fromkeys(holder for t in self._unquantized() if (holder := experts_holder_from_name(t.name))))

    def _unquantized(self) -> Iterator[DraftTensor]:
        for t in self.tensors:
            is_matrix = len(t.shape) == 2 or (len(t.shape) == 3 and experts_holder_from_name(t.name) is not None)
            if is_matrix and t.dtype != FP8 and t.module not in self.quantized and not _EMBEDDING.search(t.module):
                yield t


def unchanged(infos: Iterable[TensorInfo]) -> tuple[DraftTensor, ...]:
    """A draft tensor for every tensor, with no change."""
    return tuple(DraftTensor(info.name, info.dtype, info.shape, info) for info in infos)


def renamed(
    tensor: DraftTensor, leaf: str, *, shape: tuple[int, ...] | None = None, dtype: str | None = None
) -> DraftTensor:
    """The tensor under another leaf name, and with another shape or dtype if given."""
    shape = tensor.shape if shape is None else shape
    return replace(tensor, name=f"{tensor.module}.{leaf}", shape=shape, dtype=dtype or tensor.dtype)


# ---------------------------------------------------------------------------------------------- what changes


def changes(draft: Draft) -> tuple[Change, ...]:
    """Every kind of change with the number of tensors, then the changes of the config."""
    by_source: dict[str, list[DraftTensor]] = defaultdict(list)
    for tensor in draft.tensors:
        by_source[tensor.source.name].append(tensor)
    kinds = Counter(_difference(made[0].source, made) for made in by_source.values())
    kinds.pop("", None)
    return (
        *(Change(what=what, tensors=count) for what, count in sorted(kinds.items())),
        *(Change(what=what, tensors=0) for what in draft.config_changes),
    )


def _difference(source: TensorInfo, made: list[DraftTensor]) -> str:
    """`act_scale -> input_scale`, with dtypes and shapes if they change; empty for a plain copy."""
    facts = [(source.name, source.dtype, source.shape), *((t.name, t.dtype, t.shape) for t in made)]
    if len(set(facts)) == 1:
        return ""
    same_module, same_dtype, same_shape = (
        len({key(fact) for fact in facts}) == 1
        for key in (lambda f: f[0].rpartition(".")[0], lambda f: f[1], lambda f: f[2])
    )

    def label(fact: tuple[str, str, tuple[int, ...]]) -> str:
        name, dtype, shape = fact
        parts = [".".join(name.split(".")[-1 if same_module else -2 :])]
        return " ".join(parts + [dtype] * (not same_dtype) + [str(list(shape))] * (not same_shape))

    return f"{label(facts[0])} -> {', '.join(map(label, facts[1:]))}"
