"""Examines whether this machine can do the work: device, packages, Hub, token, disk, Prefect."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fp8pipe.errors import EngineFailed, Fp8PipeError
from fp8pipe.machine import device, survey
from fp8pipe.machine.engine_python import engine, own
from fp8pipe.machine.prefect_server import configured_api, why_silent
from fp8pipe.progress import human_bytes
from fp8pipe.records import Record

_PACKAGES = ("torch", "transformers", "prefect", "huggingface_hub", "safetensors", "datasets")
_MAX_ANSWER = 1_000_000
"""Bytes of an answer that are read."""
_LOW_DISK = 20_000_000_000
"""Warn below this many free bytes: what a 7B model takes in BF16 and FP8, with its caches."""


class Diagnosis(Record):
    """The state of one thing that a release needs."""

    name: str
    outcome: Literal["ok", "warning", "failed"]
    detail: str


def examine() -> list[Diagnosis]:
    """Examine everything, in the order in which a run would need it."""
    checks: tuple[Callable[[], Diagnosis], ...] = (_packages, _engine, _device, _hub, _token, _disk, _prefect)
    return [check() for check in checks]


def _device() -> Diagnosis:
    try:
        machine = device.examine()
    except EngineFailed:
        return Diagnosis(name="device", outcome="failed", detail="not examined without the engine's environment")
    if machine.problems:
        return Diagnosis(name="device", outcome="failed", detail="; ".join(machine.problems))
    found = _described(machine.device)
    if machine.warnings:
        return Diagnosis(name="device", outcome="warning", detail="; ".join((found, *machine.warnings)))
    return Diagnosis(name="device", outcome="ok", detail=found)


def _described(found: device.Device) -> str:
    if not found.gpus:
        note = "; a verdict from a CPU counts only under a policy that names cpu" * (found.device_class == "cpu")
        return f"{found.device_class}: {found.name}{note}"
    count = f"{len(found.gpus)} x " if len(found.gpus) > 1 else ""
    memory = {(gpu.free_bytes, gpu.total_bytes) for gpu in found.gpus}
    free, total = min(memory, key=lambda pair: pair[0] or 0)
    told = "" if free is None or total is None else f", {human_bytes(free)} of {human_bytes(total)} free"
    return f"{found.device_class}: {count}{found.name}{told}"


def _packages() -> Diagnosis:
    versions = {name: survey.version(name) for name in _PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return Diagnosis(name="packages", outcome="failed", detail=f"missing: {', '.join(missing)}; run `make setup`")
    return Diagnosis(name="packages", outcome="ok", detail=", ".join(f"{n} {v}" for n, v in versions.items()))


def _engine() -> Diagnosis:
    """The environment of vLLM and lm-eval, and what a result depends on there."""
    from fp8pipe.evaluate.environment import library_versions

    try:
        versions = library_versions()
    except EngineFailed as error:
        return Diagnosis(name="engine", outcome="failed", detail=str(error))
    place = f"{engine().python}, " if engine() != own() else ""
    return Diagnosis(name="engine", outcome="ok", detail=place + ", ".join(f"{n} {v}" for n, v in versions.items()))


def _hub() -> Diagnosis:
    from fp8pipe.hub.client import endpoint

    address = endpoint()
    try:
        with urllib.request.urlopen(f"{address}/api/models?limit=1", timeout=5) as answer:
            content = answer.read(_MAX_ANSWER)
    except urllib.error.HTTPError as error:
        content = error.read(_MAX_ANSWER)
    except (OSError, ValueError) as error:
        return Diagnosis(name="hub", outcome="failed", detail=f"{address} does not answer: {error}")
    if not _is_of_a_hub(content):
        detail = (
            f"{address} answers, but not as a Hub: it sent {content[:40]!r} for a list of models; check HF_ENDPOINT, "
            "and whether the network wants a login first"
        )
        return Diagnosis(name="hub", outcome="failed", detail=detail)
    return Diagnosis(name="hub", outcome="ok", detail=address)


def _is_of_a_hub(content: bytes) -> bool:
    """Whether this is a list of models, or the error of a Hub that shows none to strangers."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(answer, list) or (isinstance(answer, dict) and "error" in answer)


def _token() -> Diagnosis:
    from fp8pipe.hub.account import account
    from fp8pipe.hub.client import client, translated

    try:
        with translated("the token"):
            owner = account(client())
    except Fp8PipeError as error:
        detail = f"can read public models but publish nothing: {error}"
        return Diagnosis(name="token", outcome="warning", detail=detail)
    found = f"{owner.token or 'unnamed'} ({owner.role}) of {owner.user}"
    writable = owner.writable()
    if not writable:
        detail = f"{found} may publish in no namespace: it {owner.objection(owner.user)}"
        return Diagnosis(name="token", outcome="warning", detail=detail)
    return Diagnosis(name="token", outcome="ok", detail=f"{found}, may publish in {', '.join(writable)}")


def _disk() -> Diagnosis:
    free = shutil.disk_usage(Path.cwd()).free
    outcome: Literal["ok", "warning"] = "ok" if free > _LOW_DISK else "warning"
    return Diagnosis(name="disk", outcome=outcome, detail=f"{human_bytes(free)} free in {Path.cwd()}")


def _prefect() -> Diagnosis:
    api = configured_api()
    if api is None:
        return Diagnosis(name="prefect", outcome="ok", detail="no server configured: each run starts its own")
    if (silence := why_silent(api)) is not None:
        return Diagnosis(name="prefect", outcome="failed", detail=f"configured server {api} does not answer: {silence}")
    return Diagnosis(name="prefect", outcome="ok", detail=api)
