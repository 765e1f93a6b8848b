"""Reads the tables of docs/served.md."""

from __future__ import annotations

from support import ROOT


def page_table(heading: str) -> dict[str, dict[str, str]]:
    """The first table after `heading`: row -> column -> cell."""
    lines = (ROOT / "docs" / "served.md").read_text().partition(heading)[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    columns, _, *body = rows
    ends = next((i for i, row in enumerate(body) if row[0] == columns[0]), len(body))  # the next table
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in body[:ends]}
