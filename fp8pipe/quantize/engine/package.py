"""The files of a checkpoint beside its weights: companions copied byte for byte, the index, and config.json last.

Not copied: weights, pickles, the source's README and scores (the card replaces them), configs of other loaders, and
`*.py` unless remote code is trusted."""

from __future__ import annotations

import json
from pathlib import Path

from fp8pipe.files import write_atomically
from fp8pipe.hub import source
from fp8pipe.model.headers import INDEX_NAME, index_bytes
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Snapshot, record_path

_NOT_COPIED = frozenset(
    (
        *(".eval_results", "readme.md"),
        *("config.json", "params.json", "hf_quant_config.json", "adapter_config.json", "quantize_config.json"),
    )
)
"""config.json is rewritten; the others do not describe this checkpoint."""


def companions(snapshot: Snapshot, plan: Plan) -> tuple[str, ...]:
    """Names of the files that are copied. Reads none of them: they may still be downloading."""
    return companion_names(snapshot, trust_remote_code=plan.trust_remote_code)


def companion_names(snapshot: Snapshot, *, trust_remote_code: bool) -> tuple[str, ...]:
    """Names of the files that belong to any copy of the model; its own code only if `trust_remote_code`."""
    names = (file.name for file in source.companion_files(snapshot, trust_remote_code=trust_remote_code))
    return tuple(
        name for name in names if name.lower().partition("/")[0] not in _NOT_COPIED and not name.endswith(".index.json")
    )


def write_companions(snapshot: Snapshot, plan: Plan, folder: Path) -> None:
    """Write everything but weights and config.json."""
    for name in companions(snapshot, plan):
        write_atomically(folder / name, source.read_file(snapshot, name))
    if len(plan.shards()) > 1:
        write_atomically(folder / INDEX_NAME, index_bytes(output.info for output in plan.outputs))


def write_config(snapshot: Snapshot, plan: Plan, folder: Path) -> None:
    """Write config.json, and before it, among the records, the source's own: later edits are found by it. Raises
    MalformedCheckpoint."""
    config = config_bytes(snapshot, plan)
    write_atomically(record_path(folder, "source_config"), source.read_file(snapshot, "config.json"))
    write_atomically(folder / "config.json", config)


def config_bytes(snapshot: Snapshot, plan: Plan) -> bytes:
    """The source's config.json with another quantization_config and no other change. Raises MalformedCheckpoint."""
    config = source.read_config(snapshot)
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section.pop("quantization_config", None)
    config["quantization_config"] = plan.quantization_config
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
