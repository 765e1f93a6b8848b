"""Markdown that no text can break: names and texts come from configurations and other people's repositories."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote


def escape(text: object) -> str:
    """`text` as plain words in one Markdown line, table cells included: no markup, HTML, links or line breaks."""
    line = re.sub(r"([\\`*_\[\]<|~&$])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"^([-+=>#]|\d+(?=[.)](?:\s|$)))", _escape_start, line)


def _escape_start(found: re.Match[str]) -> str:
    """Escape what opens a list, heading or quote at the start of a line; of `1. ` the dot."""
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"


def code(text: object) -> str:
    """`text` as one code span, also inside a table."""
    line = " ".join(str(text).split()) or "-"
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}".replace("|", "\\|")


def fence(text: str, language: str = "") -> str:
    """`text` as a fenced block that nothing in it can close."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def url(path: str) -> str:
    """`path` as the target of a link or picture."""
    return quote(path, safe="/:._-")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with equal keys as a Markdown table, columns of numbers aligned to the right; empty without rows."""
    if not rows:
        return ""
    columns = list(rows[0])
    numeric = [all(re.match(r"$|[\d.,+\-]", row[column]) for row in rows) for column in columns]
    lines = [[escape(column) for column in columns], ["---:" if right else "---" for right in numeric]]
    lines += [[escape(row[column]) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
