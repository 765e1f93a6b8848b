"""What decides the bytes of a checkpoint, and where they are computed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fp8pipe.config import Recipe
from fp8pipe.errors import InputError
from fp8pipe.files import digest_of
from fp8pipe.records import Snapshot

if TYPE_CHECKING:
    pass

ENGINE_VERSION = 1
"""Raised whenever the same input would give other bytes."""
JOURNAL_NAME = "quantize.journal"
LOCK_NAME = "quantize.lock"
"""Files in DIR/fp8pipe/ that exist while a run is unfinished."""


def fingerprint(snapshot: Snapshot, recipe: Recipe, calibration_digest: str | None) -> str:
    """What decides the bytes of a checkpoint: equal fingerprints, equal checkpoints."""
    return digest_of(
        {
            "source": snapshot.commit,
            "recipe": recipe.identity(),
            "engine": ENGINE_VERSION,
            "calibration": calibration_digest,
        }
    )


def device_for(asked: str) -> str:
    """Where weights are quantized when a command asks for device `asked`: on a GPU that it names, else on the CPU,
    which disks seldom outrun. Imports nothing. InputError for what is no device."""
    if asked in {"auto", "cpu"}:
        return "cpu"
    if re.fullmatch(r"cuda(:\d+)?", asked):
        return asked
    raise InputError(f"device {asked!r}: expected auto, cpu, cuda or cuda:<n>")
