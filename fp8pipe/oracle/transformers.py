"""The transformers oracle: a snapshot in, its Architecture out, as transformers itself builds the model.

A supervised child process builds it on the meta device (`transformers_probe.py`), because importing transformers takes
seconds and 550 MB. A model that transformers does not know is asked of vLLM (`vllm_roles.py`), where new ones come out
first. Answers are cached.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fp8pipe.errors import UnsupportedArchitecture
from fp8pipe.files import digest_of
from fp8pipe.hub import source
from fp8pipe.hub.headers import read_headers
from fp8pipe.machine.supervise import supervise
from fp8pipe.model.architecture import Architecture
from fp8pipe.model.headers import Headers
from fp8pipe.model.untrusted import clip
from fp8pipe.oracle import bounds, vllm_roles
from fp8pipe.oracle.cache import cache_dir
from fp8pipe.records import Snapshot

PROBE_VERSION = 12
"""Increase it when the probe or its rules answer differently: cached answers of other versions are not used."""


def inspect(
    snapshot: Snapshot,
    *,
    headers: Headers | None = None,
    trust_remote_code: bool = False,
    meanwhile: Callable[[], None] | None = None,
) -> Architecture:
    """The architecture of `snapshot`, from the cache or from a child process.

    `headers` default to those of the snapshot. `meanwhile` runs in a thread while the child works; if the answer is
    cached, it does not run. Raises UnsupportedArchitecture, with the libraries' reasons, if none can build the model.
    """
    headers = headers or read_headers(snapshot)
    source.read_config(snapshot)  # what is no config never reaches a library
    config = source.read_file(snapshot, "config.json")
    key = _key(config, headers, trust_remote_code)
    for name in (key, vllm_roles.key(key)):
        known = Architecture.load_if_present(cache_dir() / f"{name}.json")
        if known is not None:
            return known
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(meanwhile) if meanwhile is not None else None
        architecture = _probe(snapshot, config, headers, trust_remote_code)
        if future is not None:
            future.result()
    name = key if architecture.answered_by == "transformers" else vllm_roles.key(key)
    architecture.save(cache_dir() / f"{name}.json")
    return architecture


def _key(config: bytes, headers: Headers, trust_remote_code: bool) -> str:
    shapes = hashlib.sha256()
    for name, info in sorted(headers.tensors.items()):
        shapes.update(f"{name}\0{info.shape}\0".encode())
    versions = [PROBE_VERSION, version("transformers"), trust_remote_code]
    return digest_of([hashlib.sha256(config).hexdigest(), shapes.hexdigest(), versions])


def _probe(snapshot: Snapshot, config: bytes, headers: Headers, trust_remote_code: bool) -> Architecture:
    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:
        folder = Path(name)
        (folder / "config.json").write_bytes(config)
        if trust_remote_code:
            for file in snapshot.files:
                if file.name.endswith(".py") and "/" not in file.name:
                    (folder / file.name).write_bytes(source.read_file(snapshot, file.name))
        request: dict[str, Any] = {"folder": name, "trust_remote_code": trust_remote_code}
        shapes = {info.name: info.shape for info in headers.tensors.values()}
        answer = _ask(request | {"tensors": shapes}, folder)
        if answer.get("unknown"):
            kinds = {info.name: [info.dtype, info.shape] for info in headers.tensors.values()}
            (known,) = vllm_roles.ask([request | {"tensors": kinds}], folder)
            reasons = [found["unsupported"] for found in (answer, known) if "unsupported" in found]
            answer = known if len(reasons) < 2 else {"unsupported": "; ".join(reasons)}
    if "unsupported" in answer:
        raise UnsupportedArchitecture(f"{snapshot.model_id}: {clip(answer['unsupported'], 1000)}")
    return Architecture.model_validate(answer)


def _ask(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run the probe. Request and answer are files in `scratch`, since libraries print on stdout."""
    asked, answer = scratch / "request.json", scratch / "answer.json"
    asked.write_text(json.dumps(request))
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "fp8pipe.oracle.transformers_probe", str(asked), str(answer)]
    count = len(request["tensors"])
    limit, memory = bounds.timeout_s(count), bounds.memory_bytes(count)
    ending = supervise(command, log=scratch / "log", env=os.environ | quiet, timeout_s=limit, memory_bytes=memory)
    if ending.reason == "timeout":
        raise UnsupportedArchitecture(f"transformers did not build this model within {limit:.0f} s; {bounds.ADVICE}")
    if not ending.succeeded or not answer.exists():
        tail = clip(ending.tail(3).replace("\n", " | "), 1000)
        raise UnsupportedArchitecture(f"transformers could not build this model: {tail}")
    return json.loads(answer.read_bytes())
