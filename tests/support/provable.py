"""A real checkpoint of a tiny model with evidence that holds in every part, as a release publishes it."""

from __future__ import annotations

import shutil
from pathlib import Path

from fp8pipe import stages
from fp8pipe.hub.source import resolve
from fp8pipe.model.identity import folder_identity
from fp8pipe.records import Checkpoint
from support.quantizing import make
from support.reports import change_engine, pair, policy, suite
from support.tiny_models import recipe

SAMPLES = 500


def provable(source: Path, folder: Path) -> Path:
    """Quantize the model in `source`, under a licence that permits it, into `folder` with fp8-dynamic, validate it, and
    accept it on made-up samples."""
    licensed = shutil.copytree(source, folder.parent / "source")
    (licensed / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (licensed / "LICENSE").write_text("MIT License\n")
    snapshot = resolve(str(licensed))
    plan, _ = make(licensed, recipe("fp8-dynamic"), folder)
    checkpoint, _ = stages.quantize(snapshot, plan, folder, calibration=None)
    stages.validate(folder, source=snapshot, oracles=False)
    judge(folder, checkpoint)
    return folder


def judge(folder: Path, checkpoint: Checkpoint, *, lost: int = 1, task: str = "qa") -> None:
    """Write the evidence of an evaluation in which the checkpoint lost that many samples of all that the task has."""
    named = {"task": task, "available": SAMPLES}
    baseline, candidate = (
        side.model_copy(update={"tasks": (side.tasks[0].model_copy(update=named),)})
        for side in pair(SAMPLES, right=450, lost=lost)
    )
    baseline = baseline.model_copy(update={"fingerprint": checkpoint.source_commit})
    about = {"fingerprint": checkpoint.fingerprint, "folder_identity": folder_identity(folder)}
    candidate = change_engine(candidate, kv_cache_dtype="auto").model_copy(update=about)
    decision = stages.gate(baseline, candidate, policy(task), suite=suite(SAMPLES, task), checkpoint_folder=folder)
    assert decision.verdict == "accepted", decision.reason
