"""The page that benchmarks write. Each has one section, which it replaces as a whole; nobody edits figures manually."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

HEAD = """\
# Benchmarks

How fast is fp8pipe? Each section compares it with a peer, or with a floor: the least that any tool must do. The figures
of a section come from one run on one machine, so compare ratios with your own, not seconds. Written by `make bench`.
"""


def put(page: Path, title: str, text: str) -> None:
    """Write `text` as section `title` of `page`, in place of the present one or at the end."""
    content = page.read_text() if page.exists() else HEAD
    section = f"## {title}\n\n{text.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(content):
        content = pattern.sub(lambda _: section + "\n", content).rstrip() + "\n"
    else:
        content = f"{content.rstrip()}\n\n{section}"
    page.write_text(content)


def prose(text: str) -> str:
    """`text`, one paragraph, in lines of at most 120 characters; code spans stay whole."""
    whole = re.sub(r"`[^`]+`", lambda span: span[0].replace(" ", "\0"), text)
    return textwrap.fill(whole, 120, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the header row `head`."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine() -> str:
    """Cores and memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB of memory"
