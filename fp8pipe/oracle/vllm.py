"""What vLLM itself would do with a checkpoint: its own parameters, and where its own loader puts every tensor on disk.

In: folders with config.json and safetensors headers. Out: an `Answer` for each. A child process builds vLLM's model on
the meta device and runs vLLM's `load_weights` on tensors without data (`oracle_probe.py`), so that nothing about names,
fused projections or experts is known twice: what vLLM renames, fuses, drops or refuses is seen as it does it. Needs
vLLM, no GPU and no weights; importing vLLM takes 17 s, each model after that well under a second.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fp8pipe.errors import EngineFailed

if TYPE_CHECKING:
    from fp8pipe.model.headers import TensorInfo

_START_S, _EACH_S = 300, 900
"""Time limits of the child: to start, and for each model."""

Kind = Literal["refused", "unread", "unfilled", "dtype", "truncated", "overlap"]
"""refused: vLLM raises on the tensor. unread: vLLM drops it. unfilled: (part of) a parameter gets no data. dtype: FP8
codes in a parameter that is not FP8, or the reverse. truncated: part of the tensor is never read. overlap: one tensor
writes over part of another."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of vLLM's model."""

    name: str
    dtype: str
    """As in a safetensors header: BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    method: str
    """Class of the quantization method of its module; empty where the module has none."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One disagreement between a checkpoint and vLLM's model."""

    kind: Kind
    tensor: str
    """On disk; empty where no tensor is to blame."""
    parameter: str
    """In vLLM; empty where the tensor reaches none."""
    expected: str
    found: str

    def sentence(self) -> str:
        """One line for people."""
        where = " -> ".join(name for name in (self.tensor, self.parameter) if name)
        return f"{where or 'the model'}: {self.kind}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True)
class Answer:
    """vLLM's view of one checkpoint."""

    parameters: tuple[Parameter, ...]
    landings: tuple[tuple[str, tuple[str, ...]], ...]
    """Tensor on disk -> parameters and buffers that hold its data, in the order of the tensors."""
    mismatches: tuple[Mismatch, ...]
    refusal: str
    """vLLM's message when it cannot build the model (an architecture or scheme it does not know); else empty. Then
    nothing else is known."""


def is_available() -> bool:
    """Whether vLLM is installed here."""
    from fp8pipe.evaluate.environment import vllm_version

    try:
        vllm_version()
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def ask_vllm(folders: Sequence[Path], *, follow: bool = True) -> dict[Path, Answer]:
    """vLLM's view of each folder, from one child process.

    `follow`: also run the loader on the tensors of the folder's safetensors headers; without it only config.json is
    read, and the answer holds parameters alone. Raises EngineFailed when vLLM is not installed or does not start,
    MalformedCheckpoint for headers that are not sound.
    """
    _require_vllm()
    requests = [_request(folder, _tensors(folder) if follow else {}) for folder in folders]
    return dict(zip(folders, _ask(requests), strict=True))


def vllm_parameters(folders: Sequence[Path]) -> dict[Path, tuple[Parameter, ...]]:
    """vLLM's parameters for each config.json, quantized as it says; () where vLLM cannot build the model."""
    return {folder: answer.parameters for folder, answer in ask_vllm(folders, follow=False).items()}


def parity(folder: Path, tensors: Mapping[str, TensorInfo] | None = None) -> tuple[Mismatch, ...]:
    """Every disagreement between the checkpoint in `folder` and vLLM's model; empty means that each tensor lands whole
    in a parameter of fitting dtype, and each parameter is filled.

    `tensors`: the checkpoint's, as far as its headers can be read. Without it they are read here, and those that are
    not sound raise MalformedCheckpoint. Raises EngineFailed when vLLM is not installed, does not start, or is killed.
    """
    _require_vllm()
    try:
        answer = _ask([_request(folder, _tensors(folder) if tensors is None else tensors)])[0]
    except _Ended as error:
        return (_refused(error.words),)
    return (_refused(answer.refusal),) if answer.refusal else answer.mismatches


def _refused(words: str) -> Mismatch:
    return Mismatch("refused", "", "", "a model that vLLM can build", words)


# ---------------------------------------------------------------------------------------------- the child


class _Ended(EngineFailed):
    """The child had started; an exception that nobody expects of vLLM ended it while it built a model."""

    def __init__(self, message: str, words: str) -> None:
        super().__init__(message)
        self.words = words
        """Of the exception."""


def _require_vllm() -> None:
    if not is_available():
        raise EngineFailed("vLLM is not installed, so its model cannot be asked; install the cpu or gpu extra")


def _tensors(folder: Path) -> Mapping[str, TensorInfo]:
    from fp8pipe.model.headers import read_folder_headers

    return read_folder_headers(folder).tensors


def _request(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {"folder": str(folder.resolve()), "tensors": {t.name: [t.dtype, t.shape] for t in tensors.values()}}


def _ask(requests: list[dict[str, Any]]) -> list[Answer]:
    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:
        return [_answer(line) for line in _run(requests, Path(name))] if requests else []


def _run(requests: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """One answer for each request; the child writes them as it goes, libraries print what they like."""
    answers, log = scratch / "answers.jsonl", scratch / "log"
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        try:
            child = subprocess.run(
                [sys.executable, "-m", "fp8pipe.oracle.vllm_probe", str(answers)],
                input="".join(json.dumps(request) + "\n" for request in requests).encode(),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | quiet,
                timeout=_START_S + _EACH_S * len(requests),
            )
        except subprocess.TimeoutExpired as error:
            raise EngineFailed(f"vLLM's model took more than {error.timeout:.0f} s to build") from None
    lines = answers.read_text().splitlines() if answers.exists() else []
    if child.returncode or len(lines) != len(requests):
        tail = log.read_text(errors="replace").strip().splitlines()[-5:]
        at = requests[min(len(lines), len(requests) - 1)]["folder"]
        message = f"{at}: vLLM ended while it built the model: {' | '.join(tail)}"
        if child.returncode > 0 and answers.exists() and tail:
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
    )
