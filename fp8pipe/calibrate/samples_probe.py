"""Chooses the samples in a process of its own: `python -m fp8pipe.calibrate.samples_probe REQUEST ANSWER`.

In: a JSON file with the data's files and the model's folder. Out: a JSON file with the samples, or with what is wrong
with the data; and a message before each step that runs code of the model. `samples.py` runs it: a tokenizer and a chat
template are a stranger's code, which may loop, allocate or crash. A step that takes too long ends the process with
SIGALRM, even where no Python code runs.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fp8pipe.calibrate.dataset import Rows, read_rows
from fp8pipe.calibrate.samples import Samples, choose_samples, context_of
from fp8pipe.calibrate.tokenization import tokenizer_of
from fp8pipe.config import CalibrationSpec
from fp8pipe.errors import CalibrationDataError
from fp8pipe.machine.memory import private_bytes
from fp8pipe.machine.supervise import Send, take_channel
from fp8pipe.oracle.lean import without


def main(request: Path, answer: Path) -> None:
    """Entry point."""
    send = take_channel()
    try:
        samples = _choose(json.loads(request.read_bytes()), send)
        found = {"indices": samples.indices, "token_ids": samples.token_ids}
    except CalibrationDataError as error:
        found = {"error": str(error)}
    answer.write_text(json.dumps(found))


def _choose(request: dict[str, Any], send: Send) -> Samples:
    with without("sklearn", "scipy"):  # transformers would import them, which takes seconds
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401  before the limit, which is the model's own

    spec, folder = CalibrationSpec.model_validate(request["spec"]), Path(request["folder"])
    trusted = request["trust_remote_code"]
    rows = read_rows(list(map(Path, request["files"])))
    limit = private_bytes() + request["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def begin(step: str) -> None:
        send({"doing": step})
        signal.setitimer(signal.ITIMER_REAL, request["step_s"])

    begin("loading the tokenizer")
    tokenizer, context = tokenizer_of(folder, trust_remote_code=trusted), context_of(folder, trust_remote_code=trusted)
    samples = choose_samples(spec, _Announced(rows, begin), tokenizer, context)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return samples


class _Announced:
    """Rows, each of which begins a step."""

    def __init__(self, rows: Rows, begin: Callable[[str], None]) -> None:
        self._rows, self._begin = rows, begin

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._begin(f"tokenizing row {index}")
        return self._rows[index]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
