"""What a validation looks at: the folder, its source, its config, what is known of the architecture, what was measured.

In: the readings of the other rooms. Out: one `Subject` that every check receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fp8pipe.validate.files import Shelf

if TYPE_CHECKING:
    from fp8pipe.validate.config import Scheme
    from fp8pipe.validate.findings import Need
    from fp8pipe.validate.layout import Layout
    from fp8pipe.validate.values import Measured


@dataclass
class Subject:
    """One checkpoint under validation."""

    shelf: Shelf
    config: dict[str, Any] | None
    """config.json; None when it does not parse (C1 says so)."""
    config_problem: str | None
    scheme: Scheme | None
    """What quantization_config means; None when it is not understood (C1 to C4 say why)."""
    layout: Layout | None
    """Which tensors play which part; None without a config."""
    source: Shelf | None = None
    source_config: dict[str, Any] | None = None
    measured: Measured | None = None
    """What the pass over the data saw; None until it ran."""

    def supplies(self, need: Need) -> bool:
        """Whether a check that needs `need` can run."""
        return {
            "config": self.config is not None,
            "scheme": self.scheme is not None and self.layout is not None,
            "source": self.source is not None,
        }[need]

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Modules that the config says are quantized, by name on disk."""
        if self.scheme is None or self.layout is None:
            return frozenset()
        return frozenset(name for name in self.layout.quantizable if self.scheme.spec_of(name) is not None)
