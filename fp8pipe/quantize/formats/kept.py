"""What an ignore list names: modules that stay unquantized, and whole parts of a model of which nothing is quantized.

vLLM builds a vision tower or a projector with the quantization config, as it builds the decoder, and looks the ignore
list up under names of its own, in which projections are fused: `visual.blocks.0.attn.qkv_proj`. For the decoder it
knows which names on disk those stand for (`packed_modules_mapping`), for towers often not. A pattern for the whole
tower covers whatever vLLM builds in it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from fp8pipe.model.fused import fused_names


@dataclass(frozen=True, slots=True)
class Kept:
    """Modules that stay unquantized. A name may be that on disk or that in transformers; lists may hold both."""

    modules: tuple[str, ...]
    """The output head, and modules in a layer in which others are quantized."""
    within: tuple[str, ...]
    """Modules that `patterns` name, by themselves or with the part around them."""
    patterns: tuple[str, ...]
    """`re:` entries for what lies outside the layers and is not quantized, whatever the model around it is called."""
    experts: tuple[str, ...]
    """Holders of kept experts."""

    def exact(self) -> Iterator[str]:
        """All names, for a list without patterns: with those of the matrices that vLLM fuses in towers."""
        yield from self.modules
        yield from dict.fromkeys(name for module in self.within for name in (module, *fused_names(module)))


def kept_of(modules: Iterable[str], experts: Iterable[str], quantized: Iterable[str]) -> Kept:
    """The kept `modules` and holders of kept `experts` of a model in which the modules `quantized` are quantized."""
    holding = _with_ancestors(quantized)
    ends = {end for name in holding for end in _ends(name)}
    alone: list[str] = []
    within: list[str] = []
    patterns: dict[str, None] = {}
    for module in modules:
        part = _whole_part(module, holding)
        if "." not in module or _is_in_a_layer(part):
            alone.append(module)
        else:
            within.append(module)
            patterns[_pattern(part, ends, "$" if part == module else "\\.")] = None
    return Kept(tuple(alone), tuple(within), tuple(patterns), tuple(experts))


def foreign_parents(modules: Iterable[str], on_disk: Iterable[str]) -> Iterator[str]:
    """Parents of those `modules` whose surroundings bear no name of the modules `on_disk`, with or without a prefix.

    A list may hold names that only transformers knows: `mlp.gate` for what is `block_sparse_moe.gate` on disk. What
    else such a parent holds, and whether it is quantized, the names on disk do not tell.
    """
    names = _with_ancestors(on_disk)
    ends = {end for name in names for end in _ends(name)}
    for module in modules:
        parent = module.rpartition(".")[0]
        if parent and parent not in ends and names.isdisjoint(_ends(parent)):
            yield parent


def _whole_part(module: str, holding: Collection[str]) -> str:
    """The largest module around `module`, or it itself, that holds nothing quantized."""
    parts = module.split(".")
    around = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((name for name in around if name not in holding), module)


def _is_in_a_layer(part: str) -> bool:
    """Whether a part lies in a numbered module that holds quantized ones: a decoder layer, whose names vLLM knows."""
    return any(name.isdigit() for name in part.split(".")[:-1])


def _pattern(part: str, ends: Collection[str], after: str) -> str:
    """The pattern of the shortest end of a part's name that is no end of the name of anything that holds quantized
    modules. vLLM's names may begin differently, or not begin at all. after: what follows the name, in the pattern."""
    known = (end for end in _ends(part) if end not in ends and not end[0].isdigit())
    shortest = min(known, key=len, default=None)
    return f"re:{re.escape(part)}{after}" if shortest is None else f"re:(.*\\.)?{re.escape(shortest)}{after}"


def _with_ancestors(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        while name and name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found


def _ends(name: str) -> Iterator[str]:
    """`visual.blocks.0`: itself, `blocks.0` and `0`."""
    while name:
        yield name
        name = name.partition(".")[2]
