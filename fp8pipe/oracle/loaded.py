"""The weights that transformers' own loader makes of a checkpoint, beside those that it makes of the source.

In: two folders. Out: one `Loaded` for each parameter of transformers' model, and each tensor that cannot be compared. A
supervised child process does the work, layer by layer (`loaded_probe.py`).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fp8pipe.errors import EnvironmentFault, UnsupportedArchitecture
from fp8pipe.machine.supervise import supervise
from fp8pipe.oracle import bounds

if TYPE_CHECKING:
    from fp8pipe.model.headers import TensorInfo

_TIMEOUT_S = 24 * 3600
"""Both sides are read from the disk: hours for the largest models."""
_BYTES_EACH = 48
"""Of memory for each element of the largest group: both sides in float32, and the copies that converting and comparing
make of them, twice over."""


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


def compare(checkpoint: Path, source: Path, tensors: Sequence[Mapping[str, TensorInfo]]) -> tuple[Loaded, ...]:
    """Every parameter that transformers loads from the two folders, compared. `tensors`: those of each.

    Raises UnsupportedArchitecture, with transformers' reason, if it cannot build or load the model, and
    EnvironmentFault if memory ran out, or something from outside ended the child: that says nothing about the model."""
    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:
        asked, answer = Path(name) / "request.json", Path(name) / "answer.json"
        asked.write_text(json.dumps({"checkpoint": str(checkpoint.resolve()), "source": str(source.resolve())}))
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "fp8pipe.oracle.loaded_probe", str(asked), str(answer)]
        ending = supervise(
            command,
            log=Path(name) / "log",
            env=os.environ | quiet,
            timeout_s=_TIMEOUT_S,
            memory_bytes=memory_bytes(tensors),
        )
        if ending.reason == "timeout":
            raise EnvironmentFault(f"{checkpoint}: transformers did not load it within {_TIMEOUT_S // 3600} h")
        if ending.killed:
            raise EnvironmentFault(
                f"{checkpoint}: the process in which transformers loads it was ended (status {ending.returncode}), "
                "probably because memory ran out; run it again, alone or on a machine with more memory"
            )
        if not ending.succeeded or not answer.exists():
            tail = ending.tail(3).replace("\n", " | ")
            raise UnsupportedArchitecture(f"{checkpoint}: transformers could not load this model: {tail}")
        found = json.loads(answer.read_bytes())
    if "unsupported" in found:
        raise UnsupportedArchitecture(f"{checkpoint}: {found['unsupported']}")
    if "memory" in found:
        raise EnvironmentFault(
            f"{checkpoint}: memory ran out while transformers loaded it ({found['memory']}); run it on a machine with "
            "more memory"
        )
    return tuple(Loaded(*fields) for fields in found["loaded"])


def memory_bytes(tensors: Sequence[Mapping[str, TensorInfo]]) -> int:
    """Private memory that the child may have: for the models without weights, and for the largest group."""
    largest = 0
    for side in tensors:
        sizes: Counter[str] = Counter()
        for info in side.values():
            sizes[group_of(info.name)] += math.prod(info.shape)
        largest = max(largest, *sizes.values(), 0)
    return bounds.memory_bytes(sum(map(len, tensors))) + _BYTES_EACH * largest


def group_of(name: str) -> str:
    """What is loaded together: the outermost entry of a module list, `model.layers.0`, or a parameter outside lists."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name
