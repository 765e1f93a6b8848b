"""A quantization_config that is understood: for any module, whether and how its weight is quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from fp8pipe.model.fused import fused_names
from fp8pipe.model.patterns import Patterns
from fp8pipe.validate.meaning.formats import Spec
from fp8pipe.validate.meaning.names import expert_of

Method = Literal["compressed-tensors", "fp8", "modelopt"]
METHODS: tuple[Method, ...] = ("compressed-tensors", "fp8", "modelopt")


@dataclass(frozen=True)
class Group:
    """One config group: which modules, and how."""

    targets: tuple[str, ...]
    spec: Spec


@dataclass(frozen=True)
class Scheme:
    """A quantization_config that is understood."""

    method: Method
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    kv: Literal["tensor", "attn_head"] | None

    def spec_of(self, module: str) -> Spec | None:
        """How the weight of a Linear (or expert) `module` is stored; None if it is not quantized.

        As in vLLM the first target that names the module counts, and a class only where none does."""
        if self.ignores(module):
            return None
        named = [target for target in (*self.target_patterns.matching(module), module) if target in self._targets]
        if named:
            return self._targets[min(named, key=self._order.__getitem__)]
        return self._targets.get("Linear")

    def ignores(self, module: str) -> bool:
        """Whether `module` is in the ignore list, as the method reads it."""
        if self.method == "modelopt":
            return module in self._exact or any(e in module or fnmatchcase(module, e) for e in self.ignore)
        if any(self._lists(name) for name in (module, *names_in_vllm(module))):
            return True
        place = expert_of(module)
        return self.method == "fp8" and place is not None and place[0] in self._experts

    def _lists(self, name: str) -> bool:
        """Whether an ignore entry names exactly this module; to quant_method fp8 a pattern is a name like others."""
        return name in self._exact or (self.method == "compressed-tensors" and self.patterns.matches(name))

    def names_head(self, module: str) -> bool:
        """Whether a target other than a class names `module`: the only way that lm_head is quantized."""
        return module in self._targets or self.target_patterns.matches(module)

    def quantizes_head(self, module: str) -> bool:
        """Whether vLLM builds `module`, the output head, as a quantized layer."""
        named = self.method == "modelopt" or self.names_head(module)
        return named and not self.ignores(module)

    def match_all(self, modules: Iterable[str]) -> None:
        """Match every name once. Patterns that cost too much for these names are refused from then on, so that no check
        sees them matched and another refused."""
        for module in modules:
            self.patterns.matches(module)
            self.target_patterns.matches(module)

    @cached_property
    def patterns(self) -> Patterns:
        """Ignore entries that are patterns; quant_method fp8 knows none."""
        return Patterns(entry for entry in self.ignore if entry.startswith("re:"))

    @cached_property
    def target_patterns(self) -> Patterns:
        """Targets that are patterns."""
        return Patterns(target for target in self._targets if target.startswith("re:"))

    @cached_property
    def _targets(self) -> dict[str, Spec]:
        """In the config's order. As in vLLM, the last group counts if several have the same target."""
        return {target: group.spec for group in self.groups for target in group.targets}

    @cached_property
    def _order(self) -> dict[str, int]:
        return {target: place for place, target in enumerate(self._targets)}

    @cached_property
    def _experts(self) -> frozenset[str]:
        """Experts modules that quant_method fp8 leaves unquantized: one ignored name in them is enough."""
        return frozenset(entry[: entry.rindex(".experts") + 8] for entry in self.ignore if ".experts" in entry)

    @cached_property
    def _exact(self) -> frozenset[str]:
        return frozenset(self.ignore)


def names_in_vllm(module: str) -> Iterator[str]:
    """Names of the matrix that vLLM fuses `module` into. Experts have none: vLLM has one layer for all of them."""
    if expert_of(module) is None:
        yield from fused_names(module)
