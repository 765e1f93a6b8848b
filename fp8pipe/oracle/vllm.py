"""The vLLM oracle: vLLM's own parameters for a checkpoint, and where its own loader puts every tensor on disk.

In: folders with config.json and safetensors headers. Out: an `Answer` for each. A supervised child process builds
vLLM's model on the meta device and runs vLLM's `load_weights` on tensors without data (`vllm_probe.py`). What vLLM
renames, fuses, drops or refuses is observed, so names, fused projections and experts need no second description here.
It needs vLLM but no GPU and no weights. Importing vLLM takes 17 s; each model then takes well under a second.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fp8pipe.errors import EngineFailed
from fp8pipe.machine.supervise import supervise

if TYPE_CHECKING:
    from fp8pipe.model.headers import TensorInfo

_START_S, _EACH_S = 300, 900
"""Time limits of the child: to start, and for each model."""

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


def is_available() -> bool:
    """Whether vLLM is installed."""
    from fp8pipe.evaluate.environment import vllm_version

    try:
        vllm_version()
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def ask_vllm(folders: Sequence[Path]) -> dict[Path, Answer]:
    """vLLM's view of each checkpoint folder, from one child process.

    Raises EngineFailed if vLLM is not installed or does not start, MalformedCheckpoint for unsound headers.
    """
    _require_vllm()
    requests = [_request(folder, _tensors(folder)) for folder in folders]
    return dict(zip(folders, _ask(requests), strict=True))


def parity(folder: Path, tensors: Mapping[str, TensorInfo] | None = None) -> tuple[Mismatch, ...]:
    """Every disagreement between the checkpoint in `folder` and vLLM's model.

    If there is none, each tensor is read completely into a parameter of fitting dtype, and each parameter is filled.
    `tensors` are those whose headers could be read; by default they are read from `folder`, and unsound headers raise
    MalformedCheckpoint. Raises EngineFailed if vLLM is not installed, does not start, or is killed; EngineIncomplete if
    it needs a package for this model that is not installed.
    """
    _require_vllm()
    try:
        answer = _ask([_request(folder, _tensors(folder) if tensors is None else tensors)])[0]
    except _Ended as error:
        return (_refused(error.words),)
    if answer.lacks:
        raise EngineIncomplete(
            f"vLLM needs the Python package {answer.lacks} to build this model, and it is not installed; "
            "install it, or leave out --oracles"
        )
    return (_refused(answer.refusal),) if answer.refusal else answer.mismatches


def _refused(words: str) -> Mismatch:
    return Mismatch("refused", "", "", "a model that vLLM can build", words)


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
    command = [sys.executable, "-m", "fp8pipe.oracle.vllm_probe", str(asked), str(answers)]
    limit = _START_S + _EACH_S * len(requests)
    ending = supervise(command, log=scratch / "log", env=os.environ | quiet, timeout_s=limit)
    if ending.reason == "timeout":
        raise EngineFailed(f"vLLM did not build the model within {limit} s")
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


def _answer(line: dict[str, Any]) -> Answer:
    return Answer(
        parameters=tuple(
            Parameter(name, dtype, tuple(shape), method) for name, dtype, shape, method in line["parameters"]
        ),
        landings=tuple((name, tuple(places)) for name, places in line["landings"]),
        mismatches=tuple(Mismatch(*fields) for fields in line["mismatches"]),
        refusal=line["refusal"],
        lacks=line["lacks"],
    )
