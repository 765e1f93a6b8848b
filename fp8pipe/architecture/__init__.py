"""What a model is made of: which tensors on disk are Linear weights, experts, routers, embeddings, and what is fused.

In: a Snapshot and its Headers. Out: an `Architecture`, keyed by the names on disk. It is known, not guessed from
names: a child process (`probe.py`) builds the model on the meta device with transformers and follows transformers'
own mapping from disk to module; `rules.py` adds what vLLM's loaders forbid. The child costs 6 to 9 s, nearly all of
it imports, so its answer is kept as a record under $FP8PIPE_CACHE (default ~/.cache/fp8pipe)."""

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
from typing import Any, Literal

from fp8pipe import source
from fp8pipe.checkpoint import Headers, read_headers
from fp8pipe.errors import InputError, UnsupportedArchitecture
from fp8pipe.records import Record, Snapshot, digest_of

Kind = Literal[
    "linear",
    "expert",
    "fused_experts",
    "kept_experts",
    "lm_head",
    "embedding",
    "router",
    "gate",
    "mixer",
    "outside",
    "unused",
    "conv",
    "norm",
    "bias",
    "parameter",
]
"""linear, expert (one matrix of one expert) and fused_experts (all experts in one 3-D tensor) may be quantized; the
others are kept. kept_experts: in a form that vLLM serves unquantized only. outside: outside the text decoder's layers.
unused: transformers has no such tensor (multi-token prediction)."""

QUANTIZABLE: frozenset[Kind] = frozenset(("linear", "expert", "fused_experts"))

PROBE_VERSION = 5
"""Raised whenever the probe or its rules answer differently: cached records of another version are not used."""

_PROBE_TIMEOUT_S = 600


class ExpertLayout(Record):
    """How a 3-D tensor [experts, ...] holds one or two Linear weights per expert."""

    transposed: bool
    """Each expert's matrix is [in, out] on disk, not [out, in]."""
    interleaved: bool
    """gate and up alternate along `out`, instead of one after the other."""
    projections: tuple[str, ...]
    """Names of the weights inside, in order along `out`: (gate_proj, up_proj), (down_proj,), ..."""


class TensorRole(Record):
    """What one tensor on disk is."""

    kind: Kind
    reason: str = ""
    """Why it is kept; empty for what may be quantized."""
    module: str = ""
    """Transformers' name of the module that owns it; empty when it has none."""
    parameter: str = ""
    """Its attribute in that module, where several tensors share one module: gate_up_proj, down_proj, ..."""
    expert: int | None = None
    """Index of the expert it belongs to, for kind `expert`."""
    parts: tuple[int, ...] = ()
    """Rows of the shards that vLLM cuts it into, for one tensor that holds q, k and v or gate and up; else empty."""
    group: str = ""
    """Name of the group that vLLM fuses into one matrix (q/k/v, gate/up, ...); empty when it stands alone."""
    layout: ExpertLayout | None = None
    """For kind `fused_experts`."""


class AttentionLayer(Record):
    """One attention module with a KV cache."""

    name: str
    """On disk: `model.layers.0.self_attn`; KV scales are named after it."""
    module: str
    """In transformers."""
    num_kv_heads: int
    head_dim: int
    mla: bool
    """Latent attention: vLLM reads no KV scales for it."""


class Architecture(Record):
    """What the probe found. All keys and names are those on disk unless said otherwise."""

    model_class: str
    model_type: str
    transformers_version: str
    tensors: dict[str, TensorRole]
    """Every tensor of the checkpoint."""
    attention: tuple[AttentionLayer, ...]
    """In layer order; without linear attention and layers that share another layer's cache."""
    num_layers: int
    layers_module: str
    """Transformers' name of the ModuleList of decoder layers: `model.layers`."""
    tied_embeddings: bool
    """lm_head is the embedding, and has no tensor of its own."""
    trust_remote_code: bool = False
    """The model's own code was run."""
    source_quantization: dict[str, Any] | None = None
    """`quantization_config` of the source, None for an unquantized model."""
    misfits: tuple[str, ...] = ()
    """Tensors of another shape than the model's parameter, and parameters of the decoder's layers that none fills."""

    def modules(self) -> dict[str, str]:
        """Names on disk of the quantizable 2-D weights' modules -> transformers' names of the modules."""
        return {
            name.removesuffix(".weight"): role.module
            for name, role in self.tensors.items()
            if role.kind in {"linear", "expert"}
        }


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


def cache_dir() -> Path:
    """Folder of architecture records."""
    root = os.environ.get("FP8PIPE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "fp8pipe") / "architectures"


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
            [sys.executable, "-m", "fp8pipe.architecture.probe", str(answer)],
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
