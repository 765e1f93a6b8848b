"""Which rows of the dataset are run, as token ids under the model's own tokenizer.

Rows are visited in a seeded permutation (numpy's, which `datasets.Dataset.shuffle` uses too); blank rows are skipped.
Each chosen row is truncated to max_seq_len and never padded. Unfit data is an error here, before any weight is read.

A tokenizer and a chat template are a stranger's code, which may loop, allocate or crash. They run in a supervised child
process (`samples_probe.py`), within bounds of time and memory.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8pipe.calibrate.dataset import Rows
from fp8pipe.calibrate.tokenization import encoder_for
from fp8pipe.config import CalibrationSpec
from fp8pipe.errors import CalibrationDataError, EnvironmentFault, Fp8PipeError
from fp8pipe.machine.supervise import Ending, Message, supervise
from fp8pipe.model.untrusted import clip

_FIRST_STEP = "reading the data"
"""What the child does until it says otherwise, without using the model's files."""
_START_S = 240.0
"""For all that is not a sample. Importing transformers takes 20 s on two cores that ten processes share."""
_STEP_S = 240.0
"""For loading the tokenizer, or for one row; tokenizers written in Python take it for a text of tens of megabytes."""
_SAMPLE_S = 10.0
"""For each sample, on average; tokenizers written in Python take it for a text of a megabyte."""
_BYTE_S = 1e-7
"""For reading each byte of the data."""
_MEMORY_BYTES = 4_000_000_000
"""Of private memory for the tokenizer and its work on one row, beside the data. The largest tokenizers take 1 GB."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What is run through the model."""

    indices: tuple[int, ...]
    """Row numbers in the dataset, in the order in which they were chosen."""
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens over all samples."""
        return sum(map(len, self.token_ids))

    def sha256(self) -> str:
        """Hash of the token ids, sample by sample."""
        return hashlib.sha256(json.dumps(self.token_ids, separators=(",", ":")).encode()).hexdigest()


def find_samples(
    spec: CalibrationSpec, files: Sequence[Path], folder: Path, *, trust_remote_code: bool = False
) -> Samples:
    """The samples among the rows of `files` under the tokenizer in `folder`, chosen in a child process.

    Raises CalibrationDataError as `choose_samples` does, and when the tokenizer or the chat template exceeds its bounds
    or ends the process; EnvironmentFault when something else ends it.
    """
    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:
        asked, answer = Path(name, "request.json"), Path(name, "answer.json")
        steps = [_FIRST_STEP]
        request = {
            "spec": spec.model_dump(mode="json"),
            "files": [str(path.absolute()) for path in files],  # the Hub's cache links to files without a suffix
            "folder": str(folder.absolute()),
            "trust_remote_code": trust_remote_code,
            "memory_bytes": _MEMORY_BYTES,
            "step_s": _STEP_S,
        }
        asked.write_text(json.dumps(request))

        def note(message: Message) -> None:
            steps[:] = [message["doing"]]

        start_s = _START_S + _BYTE_S * sum(path.stat().st_size for path in files)
        ending = supervise(
            [sys.executable, "-m", "fp8pipe.calibrate.samples_probe", str(asked), str(answer)],
            log=Path(name, "log"),
            on_message=note,
            timeout_s=start_s + _SAMPLE_S * spec.num_samples,
        )
        if not ending.succeeded or not answer.exists():
            raise _failure(ending, steps[0])
        found = json.loads(answer.read_bytes())
    if "error" in found:
        raise CalibrationDataError(found["error"])
    return Samples(tuple(found["indices"]), tuple(map(tuple, found["token_ids"])))


def _failure(ending: Ending, step: str) -> Fp8PipeError:
    """Why there is no answer. The model is to blame only for what its own files did."""
    refused = next((line for line in ending.tail(500).splitlines() if "memory allocation" in line), None)
    said = clip(refused or ending.tail(3).replace("\n", " | "), 1000)
    if ending.reason == "exited" and 0 < ending.returncode < 128:
        return Fp8PipeError(f"calibration failed while {step}: {said}")
    if ending.returncode == 128 + signal.SIGKILL:
        return EnvironmentFault(
            f"calibration was killed (signal 9) while {step}: most likely the machine ran out of memory; free some"
        )
    what = f"crashed while {step} ({said})"
    if ending.reason == "timeout" or ending.returncode == 128 + signal.SIGALRM:
        what = f"was ended after {ending.seconds:.0f} s, still {step}"
    if step == _FIRST_STEP:
        return EnvironmentFault(f"calibration {what}: the machine is overloaded, or its memory too small; try again")
    return CalibrationDataError(
        f"calibration {what}: the model's tokenizer or chat template is broken; mend its files, or set "
        "calibration.chat_template: none if it is the template"
    )


def context_of(folder: Path, *, trust_remote_code: bool = False) -> int | None:
    """The longest sequence that the model takes, in tokens; None when its config does not say.

    Raises CalibrationDataError when transformers does not read the config, or has to run code that is not trusted."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a library, or the model's own code, raises
        raise CalibrationDataError(f"{folder}: transformers cannot read config.json ({clip(error, 1000)})") from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def choose_samples(spec: CalibrationSpec, rows: Rows, tokenizer: Any, context: int | None) -> Samples:
    """Token ids of `spec.num_samples` rows.

    context: the longest sequence that the model takes, None when unknown. Raises CalibrationDataError when the data is
    empty, too short for num_samples, longer than the context, or has no usable column.
    """
    encode = encoder_for(spec, rows, tokenizer)
    indices, token_ids = [], []
    for index in _permutation(len(rows), spec.seed):
        ids = encode(rows[index])[: spec.max_seq_len]
        if ids:
            indices.append(index)
            token_ids.append(tuple(ids))
        if len(indices) == spec.num_samples:
            break
    samples = Samples(tuple(indices), tuple(token_ids))
    _check(spec, samples, len(rows), context)
    return samples


def _permutation(rows: int, seed: int) -> list[int]:
    import numpy

    return numpy.random.default_rng(seed).permutation(rows).tolist()


def _check(spec: CalibrationSpec, samples: Samples, rows: int, context: int | None) -> None:
    if len(samples.indices) < spec.num_samples:
        raise CalibrationDataError(
            f"{spec.dataset}: expected {spec.num_samples} samples, found {len(samples.indices)} that are not blank "
            f"among {rows} rows; lower num_samples or give more data"
        )
    longest = max(map(len, samples.token_ids))
    if context is not None and longest > context:
        index = samples.indices[[len(ids) for ids in samples.token_ids].index(longest)]
        raise CalibrationDataError(
            f"{spec.dataset}: row {index} has {longest} tokens, the model's context is {context}; "
            f"set max_seq_len to {context} or less"
        )
