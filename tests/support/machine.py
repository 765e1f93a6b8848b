"""What this machine can serve."""

from __future__ import annotations

import pytest

from fp8pipe.machine import device


def require_fp8_kv_cache() -> None:
    """Skip the test, with the reason, where vLLM cannot serve an FP8 KV cache: on a CPU without AVX-512, for one."""
    if problems := device.examine().problems:
        pytest.skip("; ".join(problems))
