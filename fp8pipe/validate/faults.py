"""A fault as a check finds it, and what checks need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8pipe.records import Severity

Need = Literal["config", "scheme", "source", "tensors", "files", "records", "calibration", "manifest", "vllm", "loaded"]
"""What a check cannot run without: a config.json that parses, a quantization_config that is understood, a source,
the list of its tensors or of its files at least, the engine's plan, ..."""

MAX_FINDINGS_PER_CHECK = 1000
"""A hostile checkpoint must not fill the memory with its faults: further ones are counted in one last finding."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One broken demand. Severity, consequence and remedy are those of the check unless given here."""

    expected: str
    found: str
    file: str | None = None
    tensor: str | None = None
    severity: Severity | None = None
    consequence: str | None = None
    remedy: str | None = None
    key: str | None = None
    """Dotted key of quantization_config, if the fault is about one."""
    claims: tuple[str, ...] = ()
    """Modules that this fault covers too: there the runner drops faults of checks that yield to this one."""

    @property
    def owned(self) -> frozenset[str]:
        """Names that this fault covers."""
        return frozenset(name for name in (self.tensor, self.key, self.file, *self.claims) if name is not None)

    @property
    def about(self) -> tuple[str, ...]:
        """Names by which another check's fault may speak for this one."""
        if self.tensor is not None:
            return self.tensor, self.tensor.rpartition(".")[0]
        return tuple(name for name in (self.key or self.file,) if name is not None)
