"""Whether an engine ran out of memory, and the smaller settings to retry with: smaller batches, then less context."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fp8pipe.model.untrusted import parse_json

MAX_RETRIES = 2
_USUAL_CONTEXT = 4096
"""Tokens, for a config that does not say."""

_SIGNS = re.compile(
    r"^.*(?:out of memory|OutOfMemoryError|DefaultCPUAllocator: can't allocate|\bMemoryError\b"
    r"|No available memory for the cache blocks|larger than the available KV cache memory"
    r"|less than desired GPU memory utilization|Failed to allocate).*$",
    re.MULTILINE | re.IGNORECASE,
)
_CONTEXT = re.compile("available KV cache memory|memory for the cache blocks")

KILLED = 137
"""Exit status of a process that the kernel killed with signal 9, as it does when the machine runs out of memory."""


def shortage(log_tail: str, returncode: int) -> str | None:
    """The log line that reports a shortage of memory; None if the engine ended for another reason."""
    lines = [line.strip() for line in _SIGNS.findall(log_tail)]
    if lines:
        return lines[-1]
    return "killed (signal 9): most likely the machine ran out of memory" if returncode == KILLED else None


def smaller(engine: dict[str, Any], cause: str, attempt: int, model: Path) -> dict[str, int | float]:
    """The engine arguments to change for retry number `attempt` (from 1) after `engine` ran out of memory.

    The first retry has fewer sequences, fewer tokens per step and a smaller pool, since prompt logprobs are allocated
    outside the pool. The second also has half the context; if the KV cache is what does not fit, so has the first.
    """
    pool = float(engine.get("gpu_memory_utilization", 0.9))
    changed: dict[str, int | float] = {
        "max_num_seqs": min(int(engine.get("max_num_seqs", 256)), 64 // 4 ** (attempt - 1)),
        "max_num_batched_tokens": min(int(engine.get("max_num_batched_tokens", 8192)), 2048 // 2 ** (attempt - 1)),
    }
    if _CONTEXT.search(cause):
        return changed | {"max_model_len": _context(engine, model) // 2}
    changed["gpu_memory_utilization"] = round(min(pool, max(0.1, pool - 0.1 * attempt)), 2)
    return changed if attempt == 1 else changed | {"max_model_len": _context(engine, model) // 2}


def _context(engine: dict[str, Any], model: Path) -> int:
    """Tokens of context that were requested; by default what the model's config allows, if it says so in a number."""
    config, _ = parse_json((model / "config.json").read_bytes(), constants=True)
    places = [config.get("text_config"), config] if isinstance(config, dict) else []
    found = [place.get("max_position_embeddings") for place in places if isinstance(place, dict)]
    own = next((number for number in found if isinstance(number, int)), _USUAL_CONTEXT)
    return int(engine.get("max_model_len") or own)
