"""Checkpoint folders with all their evidence, as a release leaves them after the gate."""

from __future__ import annotations

from pathlib import Path

from fp8pipe import stages
from fp8pipe.config import GatePolicy
from fp8pipe.model.identity import folder_identity
from fp8pipe.records import GateDecision
from support.cards import saved
from support.reports import pair, policy, suite
from support.sample_folders import validation, write_model

ASKING = policy(on_inconclusive="ask")


def gated(folder: Path, rules: GatePolicy = ASKING, **counts: int) -> GateDecision:
    """A checkpoint folder with all its evidence, decided by `rules` on 2,000 samples with these flips."""
    write_model(folder)
    saved(folder)
    validation(folder).save(folder / "fp8pipe" / "validation.json")
    baseline, candidate = pair(**counts)
    candidate = candidate.model_copy(update={"folder_identity": folder_identity(folder)})
    return stages.gate(baseline, candidate, rules, suite=suite(2000), checkpoint_folder=folder)
