"""The fingerprint of a checkpoint, and the device that makes it."""

from __future__ import annotations

import re

from fp8pipe.config import Recipe
from fp8pipe.errors import InputError
from fp8pipe.files import digest_of
from fp8pipe.records import Snapshot

ENGINE_VERSION = 5
"""Increase it when the same input gives different bytes."""
JOURNAL_NAME = "quantize.journal"
LOCK_NAME = "quantize.lock"
"""Files in DIR/fp8pipe/ that exist while a run is unfinished."""


def fingerprint(snapshot: Snapshot, recipe: Recipe, calibration_digest: str | None) -> str:
    """Digest of all that decides the bytes of a checkpoint: equal fingerprints mean equal checkpoints."""
    return fingerprint_of(snapshot.commit, recipe, ENGINE_VERSION, calibration_digest)


def fingerprint_of(source_commit: str, recipe: Recipe, engine_version: int, calibration_digest: str | None) -> str:
    """The same of a checkpoint that any version of the engine made."""
    parts = {"source": source_commit, "recipe": recipe.identity(), "engine": engine_version}
    return digest_of(parts | {"calibration": calibration_digest})


def device_for(asked: str) -> str:
    """The device that quantizes weights when a command asks for `asked`: a GPU if it names one, else the CPU.

    "auto" is the CPU, because disks are seldom faster. Imports nothing heavy. Raises InputError for anything else."""
    if asked in {"auto", "cpu"}:
        return "cpu"
    if re.fullmatch(r"cuda(:\d+)?", asked):
        return asked
    raise InputError(f"device {asked!r}: expected auto, cpu, cuda or cuda:<n>")
