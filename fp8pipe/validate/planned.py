"""Asks vLLM's loader about a checkpoint that is only planned, so that a recipe which it cannot read is refused first.

In: a snapshot, its headers, a plan. Out: what it said, or an error. It starts vLLM, whose answer is kept for check R1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fp8pipe.errors import ConfigError, EngineFailed
from fp8pipe.hub import source
from fp8pipe.model.headers import Headers
from fp8pipe.model.untrusted import clip
from fp8pipe.quantize.engine.package import config_bytes
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Snapshot

if TYPE_CHECKING:
    from fp8pipe.oracle.vllm import Mismatch


@dataclass(frozen=True, slots=True)
class Asked:
    """What vLLM's loader says of a plan."""

    note: str = ""
    """Why it could not be asked, or what it does not read either way."""
    unread: str = ""
    """Why it loads neither the source nor what the plan would write."""


def require_read(snapshot: Snapshot, headers: Headers, plan: Plan) -> Asked:
    """Raises ConfigError if vLLM's loader reads the source but not what the plan would write: a tensor is refused or
    reaches nothing, or a parameter is filled by none."""
    from fp8pipe.oracle.vllm import parity, version

    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:
        ours, theirs = Path(name) / "planned", Path(name) / "source"
        for folder, config in (
            (ours, config_bytes(snapshot, plan)),
            (theirs, source.read_file(snapshot, "config.json")),
        ):
            folder.mkdir()
            (folder / "config.json").write_bytes(config)
        tensors = {output.name: output.info for output in plan.outputs}
        try:
            verdict = parity(ours, tensors, source=(theirs, headers.tensors))
        except EngineFailed as error:
            return Asked(f"vLLM was not asked whether its loader reads this checkpoint: {clip(str(error), 300)}")
    if verdict.limit:
        return Asked(f"vLLM cannot tell here whether its loader reads this checkpoint: {clip(verdict.limit, 300)}")
    made = {output.name for output in plan.outputs if output.role not in ("copy", "dequantize")}
    faults = [one for one in verdict.mismatches if one.kind != "unread" or one.tensor in made]
    if brought := [one for one in faults if one not in verdict.in_source]:
        raise ConfigError(
            f"{snapshot.model_id}: the loader that vLLM {version()} has for this model does not read what recipe "
            f"{plan.recipe} would write: {_words(brought)}; choose another recipe, or write "
            "it for another version of vLLM with --no-oracles"
        )
    if faults:
        return Asked(
            f"vLLM {version()} does not read the source as it is, so that it will not read this checkpoint "
            f"either: {_words(faults)}; serve and measure it with a version of vLLM that loads the source",
            f"vLLM {version()} does not read the source either: {_words(faults)}",
        )
    return Asked()


def _words(faults: Sequence[Mismatch]) -> str:
    """The first fault in vLLM's words, and how many more there are."""
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{clip(faults[0].sentence(), 400)}{more}"
