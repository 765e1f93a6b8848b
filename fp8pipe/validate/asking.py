"""Ask vLLM's own model and loader about a checkpoint, for check R1.

In: files and headers of a checkpoint and of its source. Out: what vLLM thinks of it, or why it was not asked. Of a
repository on the Hub vLLM gets the headers and the small config files, so that nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.errors import EngineFailed
from fp8pipe.model.headers import INDEX_NAME
from fp8pipe.validate.meaning.config import CONFIG
from fp8pipe.validate.reading.checkpoint import CheckpointFiles
from fp8pipe.validate.reading.place import Place

if TYPE_CHECKING:
    from fp8pipe.oracle.vllm import Verdict

UNREADABLE = {"F1", "F2", "F9"}
"""Checks whose faults mean that some weight files are missing or cannot be read."""

_MAX_CONFIG_BYTES = 1 << 20
"""Larger JSON files are vocabularies, and vLLM builds a model without its tokenizer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of asking vLLM."""

    version: str = ""
    """Of the vLLM that was asked; empty if it was not asked or did not answer."""
    verdict: Verdict | None = None
    silent: str = ""
    """Why there is no verdict."""


_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")

NOT_ASKED = Asked(silent="vLLM was not asked")


def ask_vllm(
    files: CheckpointFiles,
    source: CheckpointFiles | None,
    *,
    config: dict[str, Any],
    config_problem: str | None,
    must: bool,
) -> Asked:
    """What vLLM thinks of the checkpoint, and if that is not good, of its source. `config`: config.json, empty if it
    does not parse; `config_problem`: what is wrong with it as a file.

    If vLLM cannot answer, the checkpoint is not at fault: the report gives the reason, and no finding. With `must`,
    EngineFailed is raised if vLLM, or a package that it needs, is not installed."""
    from fp8pipe.oracle.vllm import EngineIncomplete, parity, version

    found = version()
    if found is None and not must:
        return Asked(silent="vLLM is not installed here")
    if config_problem is not None:
        return Asked(silent=f"{CONFIG}: {config_problem} (C1)")
    if broken := sorted(UNREADABLE & files.faults.keys()):
        return Asked(silent=f"there is no whole set of weight files ({', '.join(broken)})")
    if (layers := _layers(config)) > len(files.tensors):
        return Asked(silent=f"{CONFIG} counts {layers} layers, more than there are tensors: nothing could fill them")
    if source is not None and UNREADABLE & source.faults.keys():
        source = None
    try:
        with _folder(files.place) as folder, _folder(source.place if source else files.place) as theirs:
            known = (theirs, source.tensors) if source else None
            verdict = parity(folder, files.tensors, source=known)
    except EngineIncomplete as error:
        if must:
            raise
        return Asked(silent=str(error))
    except EngineFailed as error:
        if must and found is None:
            raise
        return Asked(silent=str(error))
    return _asked(found or "", verdict, files)


def _layers(config: Any) -> int:  # Any: JSON
    """The most layers that the config, or one within it, counts."""
    if not isinstance(config, dict):
        return 0
    counts = (config.get(name) for name in _LAYER_COUNTS)
    return max((0, *(count for count in counts if isinstance(count, int)), *map(_layers, config.values())))


def _asked(version: str, verdict: Verdict, files: CheckpointFiles) -> Asked:
    if verdict.limit:
        return Asked(version, silent=f"vLLM {version} cannot tell here: {verdict.limit}")
    refusal = next((one.found for one in verdict.mismatches if not one.tensor and not one.parameter), None)
    if refusal is not None and files.place.root is None:
        return Asked(silent=f"vLLM does not build it from its configs alone: {refusal}; download it (--depth values)")
    return Asked(version, verdict)


@contextlib.contextmanager
def _folder(place: Place) -> Iterator[Path]:
    """A folder with the configs of `place`."""
    if place.root is not None:
        yield place.root
        return
    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:
        for file, size in place.sizes.items():
            if "/" not in file and file.endswith(".json") and file != INDEX_NAME and size <= _MAX_CONFIG_BYTES:
                (Path(name) / file).write_bytes(place.read(file, 0, size))
        yield Path(name)
