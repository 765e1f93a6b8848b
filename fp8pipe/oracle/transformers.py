"""transformers' own model, asked in a child process: a snapshot goes in, its Architecture comes out."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fp8pipe.errors import InputError, UnsupportedArchitecture
from fp8pipe.files import digest_of
from fp8pipe.hub import source
from fp8pipe.hub.headers import read_headers
from fp8pipe.model.architecture import Architecture
from fp8pipe.model.headers import Headers
from fp8pipe.oracle.cache import cache_dir
from fp8pipe.records import Snapshot

PROBE_VERSION = 5
"""Raised whenever the probe or its rules answer differently: cached records of another version are not used."""
_PROBE_TIMEOUT_S = 600


def inspect(
    snapshot: Snapshot,
    *,
    headers: Headers | None = None,
    trust_remote_code: bool = False,
    meanwhile: Callable[[], None] | None = None,
) -> Architecture:
    """The architecture of `snapshot`, from the cache or from a child process.

    `headers` are read from the snapshot when they are not given. `meanwhile` is run in a thread while the child
    works, and not at all when the answer is cached. Raises UnsupportedArchitecture with transformers'
    reason when it cannot build the model."""
    headers = headers or read_headers(snapshot)
    config = source.read_file(snapshot, "config.json")
    path = cache_dir() / f"{_key(config, headers, trust_remote_code)}.json"
    known = Architecture.load_if_present(path)
    if known is not None:
        return known
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(meanwhile) if meanwhile is not None else None
        architecture = _probe(snapshot, config, headers, trust_remote_code)
        if future is not None:
            future.result()
    architecture.save(path)
    return architecture


def _key(config: bytes, headers: Headers, trust_remote_code: bool) -> str:
    shapes = hashlib.sha256()
    for name, info in sorted(headers.tensors.items()):
        shapes.update(f"{name}\0{info.shape}\0".encode())
    versions = [PROBE_VERSION, version("transformers"), trust_remote_code]
    return digest_of([hashlib.sha256(config).hexdigest(), shapes.hexdigest(), versions])


def _probe(snapshot: Snapshot, config: bytes, headers: Headers, trust_remote_code: bool) -> Architecture:
    if not isinstance(_json(config), dict):
        raise InputError(f"{snapshot.model_id}: config.json is not a JSON object; it names the architecture")
    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:
        folder = Path(name)
        (folder / "config.json").write_bytes(config)
        if trust_remote_code:
            for file in snapshot.files:
                if file.name.endswith(".py") and "/" not in file.name:
                    (folder / file.name).write_bytes(source.read_file(snapshot, file.name))
        request = {
            "folder": name,
            "tensors": {info.name: info.shape for info in headers.tensors.values()},
            "trust_remote_code": trust_remote_code,
        }
        answer = _ask(request, folder / "answer.json")
    if "unsupported" in answer:
        raise UnsupportedArchitecture(f"{snapshot.model_id}: {answer['unsupported']}")
    return Architecture.model_validate(answer)


def _ask(request: dict[str, Any], answer: Path) -> dict[str, Any]:
    """Run the probe: request on its stdin, answer in a file, since libraries print on stdout."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "fp8pipe.oracle.transformers_probe", str(answer)],
            input=json.dumps(request).encode(),
            capture_output=True,
            env=os.environ | quiet,
            timeout=_PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise UnsupportedArchitecture(f"building the model took more than {_PROBE_TIMEOUT_S} s") from None
    if child.returncode or not answer.exists():
        tail = child.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise UnsupportedArchitecture(f"transformers could not build this model: {' | '.join(tail)}")
    return json.loads(answer.read_bytes())


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
