"""What compressed-tensors' own parser says of a quantization_config (for check C3).

In: a parsed JSON object. Out: (expected, found) for each thing that it refuses. The parser brings transformers with it,
seconds and 400 MB of imports, so it runs in a child process, and its answer is kept as a record under $FP8PIPE_CACHE. A
process that has the parser loaded asks it directly.

    python -m fp8pipe.oracle.compressed_tensors QUANTIZATION_CONFIG ANSWER
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fp8pipe.errors import EnvironmentFault
from fp8pipe.machine.supervise import supervise
from fp8pipe.model.untrusted import clip
from fp8pipe.oracle import bounds, cache
from fp8pipe.oracle.lean import without

RULES_VERSION = 1
"""Increase it when `ask_here` answers differently: records of another version are not used."""
_PARSER = "compressed_tensors.quantization"
_KIND = "parsed"

Problems = list[tuple[str, str]]


def problems(quant: dict[str, Any]) -> Problems:
    """What the parser refuses in `quant`, from the record, from this process, or from a child process."""
    if _PARSER in sys.modules:
        return ask_here(quant)
    key = f"{RULES_VERSION}\0{version('compressed-tensors')}\0{json.dumps(quant)}"  # answers quote it in its order
    digest = hashlib.sha256(key.encode()).hexdigest()
    found = cache.known(_KIND, digest)
    if found is None:
        found = _ask_child(json.dumps(quant))
        cache.keep(_KIND, digest, found)
    return [(expected, instead) for expected, instead in found]


def ask_here(quant: dict[str, Any]) -> Problems:
    """The same, in this process."""
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            QuantizationConfig.model_validate(quant)
    except ValidationError as error:
        return [
            (f"{'.'.join(map(str, one['loc']))}: {clip(one['msg'])}", clip(repr(one["input"])))
            for one in error.errors()
        ]
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # its validators raise whatever they stumble on; depth and size of the object are bounded where it was read
        return [("a config that compressed-tensors parses", clip(repr(error)))]
    return []


def _ask_child(text: str) -> Problems:
    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:
        asked, answer = Path(name) / "asked.json", Path(name) / "answer.json"
        asked.write_text(text)
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "fp8pipe.oracle.compressed_tensors", str(asked), str(answer)]
        limit = bounds.timeout_s(0)
        ending = supervise(
            command,
            log=Path(name) / "log",
            env=os.environ | quiet,
            timeout_s=limit,
            memory_bytes=bounds.memory_bytes(0),
        )
        if ending.reason == "timeout":
            raise EnvironmentFault(f"compressed-tensors' parser gave no answer within {limit:.0f} s")
        if not ending.succeeded or not answer.exists():
            tail = clip(ending.tail(3).replace("\n", " | "), 1000)
            raise EnvironmentFault(f"compressed-tensors' parser gave no answer: {tail}")
        return [(expected, found) for expected, found in json.loads(answer.read_text())]


def main() -> None:
    """The child."""
    # transformers imports these where they are installed, which takes seconds
    with without("sklearn", "scipy"):
        import compressed_tensors.quantization  # noqa: F401
    Path(sys.argv[2]).write_text(json.dumps(ask_here(json.loads(Path(sys.argv[1]).read_bytes()))))


if __name__ == "__main__":
    main()
