"""Files that a release makes of its evidence for the tools of others."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from support.keys import key_pair
from support.provable import judge, provable
from support.releases import release_with_card, tags

from fp8pipe.gate.publishable import Evidence, objections
from fp8pipe.hub.client import client
from fp8pipe.model.identity import content_hashes, folder_identity
from fp8pipe.records import Checkpoint, EvalReport
from fp8pipe.records.paths import record_path
from fp8pipe.rehearsal.localhub import LocalHub
from fp8pipe.release.derived import derived
from fp8pipe.release.verify import verify


@pytest.fixture(scope="module")
def checkpoint(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that may be published; tests copy it."""
    return provable(model_folder("llama"), tmp_path_factory.mktemp("provable") / "checkpoint")


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def as_task(evidence: Evidence, name: str, *, available: int | None) -> Evidence:
    """The evidence as if its task had that name, and so many documents."""

    def renamed(report: EvalReport) -> EvalReport:
        tasks = [task.model_copy(update={"task": name, "available": available}) for task in report.tasks]
        return report.model_copy(update={"tasks": tuple(tasks)})

    decided = tuple(task.model_copy(update={"task": name}) for task in evidence.decision.tasks)
    return dataclasses.replace(
        evidence,
        baseline=renamed(evidence.baseline),
        candidate=renamed(evidence.candidate),
        decision=evidence.decision.model_copy(update={"tasks": decided}),
    )


def test_the_leaderboard_entry_is_what_the_hubs_client_reads(checkpoint: Path) -> None:
    evidence = as_task(Evidence.load(checkpoint), "gsm8k", available=500)
    content = derived(checkpoint, evidence, content_hashes(checkpoint))[".eval_results/gsm8k.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(content))
    score = evidence.decision.tasks[0].candidate
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", pytest.approx(100 * score))
    assert entry.notes is not None and "0-shot, exact_match" in entry.notes and "vLLM 0.32.0 on hopper" in entry.notes


@pytest.mark.parametrize(("task", "available"), [("qa", 500), ("hellaswag", 500), ("gsm8k", 1319), ("gsm8k", None)])
def test_a_task_without_a_leaderboard_or_with_documents_left_out_has_no_entry(
    checkpoint: Path, task: str, available: int | None
) -> None:
    evidence = as_task(Evidence.load(checkpoint), task, available=available)
    made = derived(checkpoint, evidence, content_hashes(checkpoint))
    assert not [name for name in made if name.startswith(".eval_results/")]


def test_the_environment_is_that_of_both_measurements(checkpoint: Path) -> None:
    evidence = Evidence.load(checkpoint)
    machine = {"python": "3.11.9", "driver": "580.95"}
    evidence = dataclasses.replace(evidence, candidate=evidence.candidate.model_copy(update={"machine": machine}))
    said = json.loads(derived(checkpoint, evidence, content_hashes(checkpoint))["fp8pipe/environment.json"])
    assert said["candidate"]["machine"] == machine and said["baseline"]["machine"] == {}
    assert said["candidate"]["device"] == "NVIDIA H100" and said["baseline"]["versions"]["vllm"] == "0.32.0"


def test_results_are_published_proven_and_signed_with_the_release(
    hub: LocalHub, repo_id: str, folder: Path, tmp_path: Path
) -> None:
    judge(folder, Checkpoint.load(record_path(folder, "checkpoint")), task="gsm8k")
    before = folder_identity(folder)
    private, public = key_pair(tmp_path / "keys")
    made = release_with_card(folder, repo_id, sign={"key": str(private)})
    names = {file.name for file in made.files}
    assert {".eval_results/gsm8k.yaml", "fp8pipe/recipe.yaml", "fp8pipe/environment.json"} <= names
    assert folder_identity(folder) == before and objections(folder) == ()
    assert verify(repo_id, key=public).holds and verify(str(folder), key=public).holds
    local = tmp_path / "downloaded"
    client().snapshot_download(repo_id, local_dir=local)
    shutil.rmtree(local / ".cache")
    command = ["verify", "key", str(local), "--signature", str(local / "model.sig"), "--public_key", str(public)]
    done = subprocess.run([Path(sys.executable).with_name("model_signing"), *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    judge(folder, Checkpoint.load(record_path(folder, "checkpoint")))  # measured with another suite since
    second = release_with_card(folder, repo_id)
    assert ".eval_results/gsm8k.yaml" not in {file.name for file in second.files}
    assert verify(repo_id).holds and len(tags(repo_id)) == 2
