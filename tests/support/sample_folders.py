"""Model and checkpoint folders of a few kilobytes: sound, with an index, and with evidence that allows publishing."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from fp8pipe.model.identity import folder_identity
from fp8pipe.records import Approval, Checkpoint, EngineFacts, EvalReport, GateDecision, ValidationReport

FINGERPRINT = "ab12" * 16


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
    validation(folder).save(records / "validation.json")
    measured(folder).save(records / "candidate.json")
    accepted(folder).save(records / "gate.json")
    return folder


def validation(folder: Path) -> ValidationReport:
    """A validation of `folder` in its present state, without findings."""
    return ValidationReport(
        folder_identity=folder_identity(folder), depth="values", checks=("F1",), findings=(), tensors=2, bytes_read=0
    )


CHECKPOINT = Checkpoint(
    fingerprint=FINGERPRINT,
    model_id="acme/base",
    source_commit="c0ffee" * 6 + "c0ff",
    recipe="fp8-dynamic",
    recipe_digest="00",
    engine_version=1,
    calibration_digest=None,
    source_bytes=20000,
    output_bytes=10000,
    quantized_tensors=2,
    kept_tensors=0,
    seconds=1.0,
)


def measured(folder: Path) -> EvalReport:
    """A measurement of `folder` in its present state."""
    engine = EngineFacts(
        linear_kernels=(),
        attention_backend="CPU_ATTN",
        kv_cache_dtype="auto",
        quantization="compressed-tensors",
        dtype="bfloat16",
        max_model_len=256,
        arguments={},
        device_class="cpu",
        device_name="cpu",
        plugin=None,
    )
    return EvalReport(
        role="candidate",
        model_id=CHECKPOINT.model_id,
        fingerprint=FINGERPRINT,
        suite="demo",
        suite_digest="00",
        engine=engine,
        tasks=(),
        add_bos_token=True,
        chat_template_hash=None,
        tokenizer_hash="00",
        seeds={},
        versions={},
        table="",
        folder_identity=folder_identity(folder),
        seconds={},
    )


def accepted(folder: Path) -> GateDecision:
    """The decision that accepts that measurement."""
    return GateDecision(
        verdict="accepted",
        vetoed=(),
        unchecked=(),
        rules=(),
        tasks=(),
        policy="demo",
        policy_digest="00",
        suite="demo",
        alpha=0.05,
        alpha_spent=0.05,
        attempt=1,
        max_attempts=1,
        look=1,
        looks=1,
        baseline_fingerprint="c0ffee",
        candidate_fingerprint=FINGERPRINT,
        baseline_report="00",
        candidate_report=measured(folder).digest(),
        device_class="cpu",
        reason="the drop is below the margin on every task",
    )


def decide_again(folder: Path, **changes: object) -> GateDecision:
    """Replace the folder's decision by the accepting one with these changes."""
    decision = accepted(folder).model_copy(update=changes)
    decision.save(folder / "fp8pipe" / "gate.json")
    return decision


def approve_as_is(folder: Path, decision: GateDecision) -> None:
    """Write an approval of this decision, whether or not it could be approved."""
    approval = Approval(who="release team", when="2026-01-01T00:00:00Z", reason="known", decision=decision.digest())
    approval.save(folder / "fp8pipe" / "approval.json")
