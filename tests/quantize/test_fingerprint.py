"""The fingerprint of a checkpoint changes with whatever changes its bytes, and with nothing else."""

from __future__ import annotations

import pytest
from support.quantizing import Models
from support.tiny_models import plan_of, recipe

from fp8pipe.hub.source import resolve
from fp8pipe.quantize import fingerprint, identity


def test_fingerprints_depend_on_what_decides_the_bytes_and_nothing_else(model_folder: Models) -> None:
    snapshot = resolve(str(model_folder("llama")))
    base = fingerprint(snapshot, recipe(), None)
    renamed = recipe().model_copy(update={"name": "other", "description": "x"})
    assert fingerprint(snapshot, renamed, None) == base
    assert fingerprint(snapshot.model_copy(update={"root": "/elsewhere"}), recipe(), None) == base
    changed = [
        fingerprint(snapshot.model_copy(update={"commit": "x"}), recipe(), None),
        fingerprint(snapshot, recipe("fp8-block"), None),
        fingerprint(snapshot, recipe(), "calibration"),
    ]
    assert len({base, *changed}) == 4


def test_the_engine_version_is_part_of_the_fingerprint(model_folder: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = resolve(str(model_folder("llama")))
    before = fingerprint(snapshot, recipe(), None)
    monkeypatch.setattr(identity, "ENGINE_VERSION", 10**6)
    assert fingerprint(snapshot, recipe(), None) != before


def test_the_wording_of_a_plan_is_not_part_of_its_work(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama"), recipe())
    tensors = tuple(tensor.model_copy(update={"reason": "in other words"}) for tensor in plan.tensors)
    assert plan.model_copy(update={"tensors": tensors, "notes": ("x",)}).work_digest() == plan.work_digest()
