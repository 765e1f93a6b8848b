"""The vLLM oracle: vLLM's own parameters for a checkpoint, and where its own loader puts every tensor on disk.

In: folders with config.json and safetensors headers. Out: an `Answer` for each. A supervised child process builds
vLLM's model on the meta device and runs vLLM's `load_weights` on tensors without data (`vllm_probe.py`). What vLLM
renames, fuses, drops or refuses is observed, so names, fused projections and experts need no second description here.
It needs vLLM but no GPU and no weights. Importing vLLM takes 17 s, following a model some milliseconds for each of its
modules. What vLLM thinks of a checkpoint is kept (`cache`).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fp8pipe.errors import EngineFailed
from fp8pipe.files import digest_of
from fp8pipe.machine.builds import vllm_version
from fp8pipe.machine.engine_python import engine
from fp8pipe.machine.supervise import supervise
from fp8pipe.oracle import bounds, cache
from fp8pipe.oracle.basis import basis

if TYPE_CHECKING:
    from fp8pipe.model.headers import TensorInfo

_KIND = "vllm"
_START_S, _MODEL_S, _TENSOR_S = 300, 120, 0.01
"""Time limits of the child: to start, for each model, and for each of its tensors, all about ten times what they take.
A config may describe a model that nobody could build."""

Kind = Literal["refused", "unread", "unfilled", "dtype", "truncated", "overlap"]
"""refused: vLLM raises an error on the tensor. unread: vLLM drops it. unfilled: a parameter, or part of it, gets no
data. dtype: FP8 codes in a parameter that is not FP8, or the reverse. truncated: part of the tensor is never read.
overlap: one tensor overwrites part of another."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of vLLM's model."""

    name: str
    dtype: str
    """As in a safetensors header: BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    method: str
    """Class of its module's quantization method; empty if it has none."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One disagreement between a checkpoint and vLLM's model."""

    kind: Kind
    tensor: str
    """Name on disk; empty if no tensor is at fault."""
    parameter: str
    """Name in vLLM; empty if the tensor reaches no parameter."""
    expected: str
    found: str
    asked: str = ""
    """The name under which the parameter's module asked for a quantization method, which is the one that vLLM looks for
    in an ignore list; empty if it did not ask."""

    def sentence(self) -> str:
        """The disagreement in one line, for people."""
        where = " -> ".join(name for name in (self.tensor, self.parameter) if name)
        return f"{where or 'the model'}: {self.kind}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True)
class Answer:
    """vLLM's view of one checkpoint."""

    parameters: tuple[Parameter, ...]
    landings: tuple[tuple[str, tuple[str, ...]], ...]
    """(tensor on disk, the parameters and buffers that its data reach), in the order of the tensors."""
    mismatches: tuple[Mismatch, ...]
    refusal: str
    """vLLM's message if it cannot build the model, and then nothing else is known; empty if it can."""
    lacks: str = ""
    """The Python package that vLLM needs for this model and that is not installed; then too nothing else is known."""
    limit: str = ""
    """Why this way of asking cannot tell: vLLM asked for the data of a tensor, or this platform lacks what it needs."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What vLLM thinks of a checkpoint."""

    mismatches: tuple[Mismatch, ...] = ()
    """If there is none, each tensor lies whole in a parameter of fitting dtype, and each parameter is filled."""
    in_source: frozenset[Mismatch] = frozenset()
    """Those of `mismatches` that the source has as well: the checkpoint did not bring them."""
    limit: str = ""
    """As in Answer: vLLM was asked, and there is no verdict."""


def version() -> str | None:
    """Version of the engine's vLLM; None if there is none."""
    return vllm_version()


def is_available() -> bool:
    """Whether vLLM is installed."""
    return version() is not None


def ask_vllm(folders: Sequence[Path]) -> dict[Path, Answer]:
    """vLLM's view of each checkpoint folder, from one child process.

    Raises EngineFailed if vLLM is not installed or does not start, MalformedCheckpoint for unsound headers.
    """
    _require_vllm()
    requests = [_request(folder, _tensors(folder)) for folder in folders]
    return dict(zip(folders, _ask(requests), strict=True))


def parity(
    folder: Path,
    tensors: Mapping[str, TensorInfo] | None = None,
    *,
    source: tuple[Path, Mapping[str, TensorInfo]] | None = None,
) -> Verdict:
    """Every disagreement between the checkpoint in `folder` and vLLM's model.

    `tensors` are those whose headers could be read; by default they are read from `folder`, and unsound headers raise
    MalformedCheckpoint. If there are disagreements, the model that the checkpoint was made from is asked too: `source`
    is its folder and tensors; without one, it is the config without quantization, which tells only whether vLLM can
    build such a model. Only config.json (and hf_quant_config.json) is read from the folders.

    Raises EngineFailed if vLLM is not installed, does not start, or is killed; EngineIncomplete if it needs a package
    for this model that is not installed.
    """
    _require_vllm()
    request = _request(folder, _tensors(folder) if tensors is None else tensors)
    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:
        scratch = Path(name)
        request["source"] = _request(*source) if source else {"folder": _unquantized(folder, scratch), "tensors": {}}
        key = _key(request)
        line = cache.known(_KIND, key)
        if line is None:
            line = _ask_one(request, scratch)
            if _is_settled(line) and _is_settled(line["source"]):
                cache.keep(_KIND, key, line)
    return _verdict(line)


def _ask_one(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """The child's answer, without what a verdict does not need."""
    try:
        (line,) = run_probe([request], scratch)
    except _Ended as error:
        line = {"refusal": error.words, "mismatches": [], "lacks": "", "limit": "", "source": None}
    for part in (line, line["source"] or {}):
        part.pop("parameters", None)
        part.pop("landings", None)
    return line


def _is_settled(line: dict[str, Any] | None) -> bool:
    """Whether the answer depends on config, headers and versions alone. A refusal to build the model may be due to a
    missing file or to the machine."""
    return line is None or not (line["refusal"] or line["lacks"] or line["limit"])


def _verdict(line: dict[str, Any]) -> Verdict:
    if line["lacks"]:
        raise EngineIncomplete(
            f"vLLM needs the Python package {line['lacks']} to build this model, and it is not installed; install it, "
            "or pass --no-oracles"
        )
    if line["limit"]:
        return Verdict(limit=line["limit"])
    theirs = {_what(one) for one in _mismatches(line["source"])} if line["source"] else set()
    found = _mismatches(line)
    return Verdict(found, frozenset(one for one in found if _what(one) in theirs))


def _what(mismatch: Mismatch) -> tuple[str, ...]:
    """What makes a mismatch the same in two models: where it is, or if it is the model as such, vLLM's words."""
    where = (mismatch.kind, mismatch.tensor, mismatch.parameter)
    return where if any(where[1:]) else (mismatch.kind, mismatch.found)


def _mismatches(line: dict[str, Any]) -> tuple[Mismatch, ...]:
    if line["refusal"]:
        return (Mismatch("refused", "", "", "a model that vLLM can build", line["refusal"]),)
    return tuple(Mismatch(*fields) for fields in line["mismatches"])


def _unquantized(folder: Path, scratch: Path) -> str:
    """A folder beside the requests with the same config.json, but for its quantization_config."""
    plain = scratch / "unquantized"
    plain.mkdir()
    config = json.loads((folder / "config.json").read_bytes())
    (plain / "config.json").write_text(json.dumps(_without_quantization(config)))
    return str(plain)


def _without_quantization(value: Any) -> Any:
    """The JSON value without quantization_config, which may be in a nested config."""
    if not isinstance(value, dict):
        return value
    names = ("quantization_config", "compression_config")
    return {name: _without_quantization(part) for name, part in value.items() if name not in names}


def _key(request: dict[str, Any]) -> str:
    """What the answer depends on: both models' configs and headers, and all that has a say in every answer."""
    models = [[_content(Path(one["folder"])), one["tensors"]] for one in (request, request["source"])]
    return digest_of([basis(version()), models])


def _content(folder: Path) -> list[str]:
    files = (folder / name for name in ("config.json", "hf_quant_config.json"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "" for file in files]


# ---------------------------------------------------------------------------------------------- the child


class EngineIncomplete(EngineFailed):
    """vLLM needs a Python package for this model that is not installed."""


class _Ended(EngineFailed):
    """The child started, but an exception that vLLM is not known to raise ended it while it built a model."""

    def __init__(self, message: str, words: str) -> None:
        super().__init__(message)
        self.words = words
        """The exception's own message."""


def _require_vllm() -> None:
    if not is_available():
        raise EngineFailed("vLLM is not installed, so it cannot check the checkpoint; install the cpu or gpu extra")


def _tensors(folder: Path) -> Mapping[str, TensorInfo]:
    from fp8pipe.model.headers import read_folder_headers

    return read_folder_headers(folder).tensors


def _request(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {"folder": str(folder.resolve()), "tensors": {t.name: [t.dtype, t.shape] for t in tensors.values()}}


def _ask(requests: list[dict[str, Any]]) -> list[Answer]:
    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:
        return [_answer(line) for line in run_probe(requests, Path(name))] if requests else []


def run_probe(requests: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """One answer per request, as the child writes them to a file; libraries print to the log."""
    asked, answers = scratch / "requests.jsonl", scratch / "answers.jsonl"
    asked.write_text("".join(json.dumps(request) + "\n" for request in requests))
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    command = engine().command("fp8pipe.oracle.vllm_probe", asked, answers)
    limit = _START_S + sum(_MODEL_S + _TENSOR_S * len(one["tensors"]) for one in _models(requests))
    memory = max(bounds.memory_bytes(len(one["tensors"])) for one in _models(requests))
    variables = engine().variables(quiet)
    ending = supervise(command, log=scratch / "log", env=variables, timeout_s=limit, memory_bytes=memory)
    if ending.reason == "timeout":
        raise EngineFailed(f"vLLM did not build the model within {limit:.0f} s")
    lines = answers.read_text().splitlines() if answers.exists() else []
    if not ending.succeeded or len(lines) != len(requests):
        tail = ending.tail(5).splitlines()
        at = requests[min(len(lines), len(requests) - 1)]["folder"]
        message = f"{at}: vLLM ended while it built the model: {' | '.join(tail)}"
        raised = 0 < ending.returncode < 128  # otherwise a signal ended it
        if raised and answers.exists() and tail:
            raise _Ended(message, tail[-1])
        raise EngineFailed(message)
    return [json.loads(line) for line in lines]


def _models(requests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All that the child may have to build."""
    for request in requests:
        yield request
        if "source" in request:
            yield request["source"]


def _answer(line: dict[str, Any]) -> Answer:
    return Answer(
        parameters=tuple(
            Parameter(name, dtype, tuple(shape), method) for name, dtype, shape, method in line["parameters"]
        ),
        landings=tuple((name, tuple(places)) for name, places in line["landings"]),
        mismatches=tuple(Mismatch(*fields) for fields in line["mismatches"]),
        refusal=line["refusal"],
        lacks=line["lacks"],
        limit=line["limit"],
    )
