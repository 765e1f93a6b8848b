"""vLLM's answer for a model that transformers does not know: every tensor's role, by vLLM's own model and loader.

In: a folder with config.json, and tensors by name, dtype and shape. Out: the fields of Architecture. A supervised child
process (`vllm_roles_probe.py`) builds vLLM's model on the meta device and follows its loader.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8pipe.files import digest_of
from fp8pipe.machine.builds import vllm_version
from fp8pipe.machine.engine_python import engine
from fp8pipe.machine.supervise import supervise
from fp8pipe.oracle import bounds

PROBE_VERSION = 1
"""Increase it when the probe answers differently: cached answers of other versions are not used."""
_START_S, _EACH_S = 300, 600
"""Time limits of the child: to start, and for each model."""


def key(model: str) -> str:
    """Under which vLLM's answer about `model`, a digest of config and headers, is cached."""
    return digest_of([model, PROBE_VERSION, vllm_version()])


def ask(requests: Sequence[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """For each request the fields of Architecture, or {"unsupported": why}, from one child. Files go to `scratch`."""
    if vllm_version() is None:
        return [{"unsupported": "vLLM, which may know it, is not installed"}] * len(requests)
    asked, answer = scratch / "vllm-request.json", scratch / "vllm-answer.json"
    asked.write_text(json.dumps(requests))
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    command = engine().command("fp8pipe.oracle.vllm_roles_probe", asked, answer)
    limit = _START_S + _EACH_S * len(requests)
    memory = max(bounds.memory_bytes(len(request["tensors"])) for request in requests)
    variables = engine().variables(quiet)
    ending = supervise(command, log=scratch / "vllm-log", env=variables, timeout_s=limit, memory_bytes=memory)
    if ending.reason == "timeout":
        return [{"unsupported": f"vLLM did not build it within {limit} s"}] * len(requests)
    if not ending.succeeded or not answer.exists():
        tail = ending.tail(3).replace("\n", " | ")
        return [{"unsupported": f"vLLM could not build it: {tail}"}] * len(requests)
    return json.loads(answer.read_bytes())
