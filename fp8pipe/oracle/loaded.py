"""The weights that transformers' own loader makes of a checkpoint, beside those that it makes of the source.

In: two folders. Out: one `Loaded` for each parameter of transformers' model, and each tensor that cannot be compared. A
supervised child process does the work, layer by layer (`loaded_probe.py`).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fp8pipe.errors import UnsupportedArchitecture
from fp8pipe.machine.supervise import supervise

_TIMEOUT_S = 24 * 3600
"""Both sides are read from the disk: hours for the largest models."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """One parameter of transformers' model, filled by both sides, or something that cannot be compared."""

    name: str
    """transformers' name; on disk for a tensor that it does not load."""
    quantized: bool
    """A tensor of FP8 codes went into it."""
    error: float
    """L2 norm of the difference over that of the source's; for experts of the worst one. 0 if not compared."""
    fault: str = ""
    """Why one side's parameter is not the other's: not filled, or of another shape."""
    incomparable: str = ""
    """Why it was not compared."""


def compare(checkpoint: Path, source: Path) -> tuple[Loaded, ...]:
    """Every parameter that transformers loads from the two folders, compared.

    Raises UnsupportedArchitecture, with transformers' reason, if it cannot build or load the model."""
    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:
        asked, answer = Path(name) / "request.json", Path(name) / "answer.json"
        asked.write_text(json.dumps({"checkpoint": str(checkpoint.resolve()), "source": str(source.resolve())}))
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "fp8pipe.oracle.loaded_probe", str(asked), str(answer)]
        ending = supervise(command, log=Path(name) / "log", env=os.environ | quiet, timeout_s=_TIMEOUT_S)
        if not ending.succeeded or not answer.exists():
            tail = ending.tail(3).replace("\n", " | ")
            raise UnsupportedArchitecture(f"{checkpoint}: transformers could not load this model: {tail}")
        found = json.loads(answer.read_bytes())
    if "unsupported" in found:
        raise UnsupportedArchitecture(f"{checkpoint}: {found['unsupported']}")
    return tuple(Loaded(*fields) for fields in found["loaded"])
