"""The findings of a validation."""

from __future__ import annotations

from typing import Literal

from fp8pipe.records.base import Record
from fp8pipe.records.checkpoint import FileHash
from fp8pipe.records.serving import Serving

Severity = Literal["error", "warning"]
Depth = Literal["headers", "values", "fidelity", "loaded"]
DEPTHS: tuple[Depth, ...] = ("headers", "values", "fidelity", "loaded")
"""How much a validation read: headers and small files, every byte, every byte beside its source, and what
transformers' own loader makes of both. Each includes the one before it."""


class Finding(Record):
    """One thing that is wrong, and what to do about it."""

    check: str
    """Id of the check (F1, C2, K3, ...), see docs/validate.md."""
    severity: Severity
    file: str | None = None
    tensor: str | None = None
    expected: str
    found: str
    consequence: str = ""
    """What vLLM would do with it."""
    remedy: str

    def sentence(self) -> str:
        """`K2 error model.layers.0...: expected ..., found ...; remedy`."""
        where = ":".join(part for part in (self.file, self.tensor) if part)
        return f"{self.check} {self.severity} {where}: expected {self.expected}, found {self.found}; {self.remedy}"


class ValidationReport(Record):
    """All findings of one validation; without errors the checkpoint is sound. `DIR/fp8pipe/validation.json`."""

    folder_identity: str | None
    """Digest of the content that was validated; on the Hub, the commit. None for the headers of a folder."""
    files: tuple[FileHash, ...] = ()
    """Every file of the folder whose content was validated, as it was then."""
    depth: Depth
    known_from: Literal["architecture", "names"] = "names"
    """How Linears were recognized: by the architecture record, or only by names and shapes."""
    checks: tuple[str, ...]
    """Ids of the checks that ran."""
    findings: tuple[Finding, ...]
    tensors: int
    bytes_read: int
    vllm: str = ""
    """Version of the vLLM whose own model and loader were asked about the checkpoint (R1); empty if none was."""
    vllm_silent: str = "vLLM was not asked"
    """Why vLLM gave no answer, and R1 did not run; empty if it did."""
    loaded_silent: str = ""
    """Why transformers gave no answer although depth loaded was wanted, so that the report's depth is less, and L1 and
    L2 did not run; empty if it did, or was not asked."""
    serving: Serving | None = None
    """What will serve it; None if its scheme is not understood, or vLLM's kernels for it are not known here."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity == "warning")

    @property
    def sound(self) -> bool:
        """Whether no finding is an error."""
        return not self.errors

    def covers(self, depth: Depth) -> bool:
        """Whether it read all that `depth` reads."""
        return DEPTHS.index(self.depth) >= DEPTHS.index(depth)

    def heard(self, vllm: str) -> bool:
        """Whether vLLM of that version said what it makes of the checkpoint."""
        return self.vllm == vllm and not self.vllm_silent
