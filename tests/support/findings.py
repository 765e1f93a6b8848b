"""What a report says, in short."""

from __future__ import annotations

from fp8pipe.records import ValidationReport


def ids(report: ValidationReport) -> set[str]:
    return {finding.check for finding in report.findings}
