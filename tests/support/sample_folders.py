"""Model and checkpoint folders of a few kilobytes: sound, with an index, and with evidence that allows publishing."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from fp8pipe.config import GatePolicy
from fp8pipe.files import write_atomically
from fp8pipe.gate import decide
from fp8pipe.model.identity import content_hashes, identity_of
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Approval, Checkpoint, GateDecision, ValidationReport
from support.reports import SOURCE_COMMIT, checkpoint, pair, policy, recipe, suite

FINGERPRINT = "ab12" * 16
SAMPLES = 500
STRICTER = policy(margin=0.015)
"""A policy under which the same checkpoint is accepted too."""
CHECKPOINT = checkpoint(fingerprint=FINGERPRINT, calibration_digest=None)


def safetensors(**tensors: bytes) -> bytes:
    """A safetensors file of one-dimensional U8 tensors."""
    header, offset = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


def write_model(folder: Path, *, shards: int = 2) -> Path:
    """A model folder with an index. Each folder has other weights, so that a Hub does not know them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(
            safetensors(**{f"layer.{i}.weight": hashlib.sha256(f"{folder} {i}".encode()).digest() * 160})
        )
    weight_map = {f"layer.{i}.weight": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("Apache-2.0")
    return folder


def write_checkpoint(folder: Path) -> Path:
    """A folder that may be published: a model with the evidence of a gate that accepted it."""
    return add_evidence(write_model(folder))


def add_evidence(folder: Path) -> Path:
    """Add the evidence of a gate that accepted the folder in its present state."""
    records = folder / "fp8pipe"
    CHECKPOINT.save(records / "checkpoint.json")
    plan().save(records / "plan.json")
    validation(folder).save(records / "validation.json")
    gate_again(folder)
    return folder


def plan() -> Plan:
    """The plan of the checkpoint that the reports of `support.reports` are about, without its tensors."""
    return Plan(
        model_id="acme/tiny",
        source_commit=SOURCE_COMMIT,
        recipe="fp8-static-kv",
        settings=recipe(),
        tensors=(),
        outputs=(),
        quantization_config={},
        source_bytes=2_000_000,
        output_bytes=1_100_000,
    )


def validation(folder: Path) -> ValidationReport:
    """A validation of `folder` in its present state, without findings."""
    files = content_hashes(folder)
    identity = identity_of(files)
    return ValidationReport(
        folder_identity=identity, files=files, depth="values", checks=("F1",), findings=(), tensors=2, bytes_read=0
    )


def gate_again(folder: Path, rules: GatePolicy | None = None, **counts: int) -> GateDecision:
    """Measure the checkpoint in its present state, and write what the gate decides, as `stages.gate` does but without
    plots. `counts`: samples lost and won; without them, it scores as its baseline does, and is accepted."""
    found = Checkpoint.load(folder / "fp8pipe" / "checkpoint.json")
    rules, asked = rules or policy(), suite(SAMPLES)
    baseline, candidate = pair(SAMPLES, right=450, **counts)
    baseline = baseline.model_copy(update={"model_id": found.model_id, "fingerprint": found.source_commit})
    about = {
        "model_id": found.model_id,
        "fingerprint": found.fingerprint,
        "folder_identity": identity_of(content_hashes(folder)),
    }
    candidate = candidate.model_copy(update=about)
    for name, config in (("policy", rules), ("suite", asked)):
        write_atomically(folder / "fp8pipe" / f"{name}.json", config.model_dump_json().encode())
    baseline.save(folder / "fp8pipe" / "baseline.json.gz")
    candidate.save(folder / "fp8pipe" / "candidate.json.gz")
    decision = decide(baseline, candidate, rules, checkpoint=found, suite=asked, recipe=recipe())
    decision.save(folder / "fp8pipe" / "gate.json")
    return decision


def edit(folder: Path, **changes: object) -> None:
    """Change these fields of the folder's decision, as somebody does who edits gate.json."""
    path = folder / "fp8pipe" / "gate.json"
    GateDecision.load(path).model_copy(update=changes).save(path)


def approve_as_is(folder: Path, decision: GateDecision) -> None:
    """Write an approval of this decision, whether or not it could be approved."""
    approval = Approval(who="release team", when="2026-01-01T00:00:00Z", reason="known", decision=decision.digest())
    approval.save(folder / "fp8pipe" / "approval.json")
