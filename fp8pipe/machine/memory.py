"""How much private memory this process has, and may have.

Private memory is what RLIMIT_DATA counts: not the files that it maps.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def at_most(more_bytes: int) -> Iterator[None]:
    """Inside the context, the process may take that much more than it has; the kernel refuses it the rest."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (private_bytes() + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def private_bytes() -> int:
    """What it has, in bytes."""
    return int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
