"""May a folder be published? Every objection, and the same answer to everyone who asks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.reports import change_task, policy, suite
from support.sample_folders import approve_as_is, edit, gate_again, validation, write_checkpoint

from fp8pipe import stages
from fp8pipe.errors import Refused
from fp8pipe.gate.publishable import objections, require_publishable
from fp8pipe.records import EarlierAttempt, EvalReport, Finding, GateDecision, RuleOutcome, TaskDecision
from fp8pipe.records.paths import record_path

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be published."""
    return write_checkpoint(tmp_path / "checkpoint")


def only_objection(folder: Path) -> str:
    (objection,) = objections(folder)
    return objection


def test_an_accepted_checkpoint_may_be_published(folder: Path) -> None:
    assert objections(folder) == ()
    assert require_publishable(folder).decision.verdict == "accepted"
    assert stages.may_publish(folder)


@pytest.mark.parametrize("record", ["checkpoint", "plan", "validation", "baseline", "candidate", "gate"])
def test_without_one_of_its_records_a_folder_may_not_be_published(folder: Path, record: str) -> None:
    path = record_path(folder, record)
    content = path.read_bytes()
    path.unlink()
    assert f"{record}.json" in only_objection(folder)
    path.write_bytes(content[:-20])
    assert f"{record}.json" in only_objection(folder)
    with pytest.raises(Refused, match=rf"{record}\.json"):
        stages.may_publish(folder)


def test_a_report_that_would_fill_the_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8pipe.records.base.MAX_UNPACKED", 1000)
    assert "larger than 1,000 bytes" in only_objection(folder)


REJECTED = {"lost": 60}
INCONCLUSIVE = {"lost": 10, "won": 5}
"""Flips of samples by which the gate decides so."""
ASKING = policy(on_inconclusive="ask")
NOT_DERIVED = "is not what the reports and the policy give"


def test_a_checkpoint_that_the_gate_rejects_may_not_be_published_even_with_an_approval(folder: Path) -> None:
    approve_as_is(folder, gate_again(folder, **REJECTED))
    assert "the gate rejected it" in only_objection(folder) and "12.00 points" in only_objection(folder)
    assert not stages.may_publish(folder)
    with pytest.raises(Refused, match="rejected it") as error:
        require_publishable(folder)
    assert error.value.exit_code == 1


def test_an_inconclusive_checkpoint_may_be_published_with_an_approval_of_its_own_decision(folder: Path) -> None:
    decision = gate_again(folder, ASKING, **INCONCLUSIVE)
    assert "there is no approval" in only_objection(folder)
    approve_as_is(folder, decision)
    assert objections(folder) == ()
    assert stages.may_publish(folder)
    gate_again(folder, ASKING, lost=11, won=5)
    assert "approval is of another decision" in only_objection(folder)
    assert not stages.may_publish(folder)


def test_an_approval_counts_only_under_the_policy_that_lets_people_decide(folder: Path) -> None:
    approve_as_is(folder, gate_again(folder, policy(), **INCONCLUSIVE))
    assert "stops at an inconclusive result" in only_objection(folder)
    (folder / "fp8pipe" / "policy.json").write_text(ASKING.model_dump_json())
    assert any("not the policy that the gate decided by" in objection for objection in objections(folder))
    (folder / "fp8pipe" / "policy.json").write_text("{")
    assert any("missing or not a policy" in objection for objection in objections(folder))


def test_a_rule_left_unchecked_is_an_error_to_a_flow_even_if_the_numbers_suffice(folder: Path) -> None:
    (folder / "fp8pipe" / "suite.json").unlink()
    edit(folder, unchecked=("completeness",))
    assert any("unchecked: completeness" in objection for objection in objections(folder))
    with pytest.raises(Refused, match="unchecked: completeness"):
        stages.may_publish(folder)


# ---------------------------------------------------------------------------------------------- edited evidence


def edits() -> dict[str, object]:
    """Another value for each field of a decision on one task."""
    task = {"task": "other", "metric": "acc", "filter": "strict", "verdict": "rejected", "reason": "", "method": "none"}
    numbers = ("n", "baseline", "candidate", "drop", "drop_lower", "drop_upper", "margin", "p_accept", "p_reject")
    counts = ("discordant_lost", "discordant_won", "mcnemar_p", "recovery")
    tasks = task | dict.fromkeys(numbers, 0.125) | {"n": 499} | dict.fromkeys(counts, 7)
    return {
        "verdict": "inconclusive",
        "vetoed": ("size",),
        "unchecked": ("size",),
        "policy": "lax",
        "suite": "easy",
        "policy_digest": "0",
        "baseline_fingerprint": "0",
        "candidate_fingerprint": "0",
        "baseline_report": "0",
        "candidate_report": "0",
        "device_class": "cpu",
        "reason": "fine",
        "alpha": 0.1,
        "alpha_spent": 0.1,
        "attempt": 2,
        "max_attempts": 2,
        "look": 2,
        "looks": 2,
        "earlier": (EarlierAttempt(**EARLIER),),
        **{f"rules.{name}": value for name, value in (("rule", "x"), ("outcome", "unchecked"), ("reason", "x"))},
        **{f"tasks.{name}": value for name, value in tasks.items()},
    }


EARLIER = {"recipe": "fp8-static", "fingerprint": "0", "reason": "dropped"}


def test_every_field_of_a_decision_is_edited_here() -> None:
    whole = {name for name in GateDecision.model_fields if name not in {"rules", "tasks"}}
    parts = {"rules": RuleOutcome, "tasks": TaskDecision}
    assert edits().keys() == whole | {f"{at}.{name}" for at, kind in parts.items() for name in kind.model_fields}


@pytest.mark.parametrize("field", sorted(edits()))
def test_an_edited_decision_is_refused(folder: Path, field: str) -> None:
    whole, _, part = field.partition(".")
    value: object = edits()[field]
    if part:
        first, *others = getattr(GateDecision.load(folder / "fp8pipe" / "gate.json"), whole)
        value = (first.model_copy(update={part: value}), *others)
    edit(folder, **{whole: value})
    assert any(NOT_DERIVED in objection for objection in objections(folder))


@pytest.mark.parametrize("record", ["baseline", "candidate"])
def test_a_report_with_edited_samples_is_refused(folder: Path, record: str) -> None:
    path = record_path(folder, record)
    report = EvalReport.load(path)
    metric = report.tasks[0].metrics[0]
    values = (*metric.values[:-1], 1.0 - metric.values[-1])
    better = metric.model_copy(update={"values": values, "mean": sum(values) / len(values)})
    change_task(report, metrics=(better,)).save(path)
    assert NOT_DERIVED in only_objection(folder)


def test_another_policy_or_suite_than_the_gate_had_is_refused(folder: Path) -> None:
    path = folder / "fp8pipe" / "policy.json"
    path.write_text(policy(margin=0.5).model_dump_json())
    assert NOT_DERIVED in only_objection(folder) and "margin: says 0.02, is 0.5" in only_objection(folder)
    path.write_text(policy().model_dump_json())
    (folder / "fp8pipe" / "suite.json").write_text(suite(100).model_dump_json())
    assert NOT_DERIVED in only_objection(folder) and "rules[2].outcome: says 'passed'" in only_objection(folder)


# ---------------------------------------------------------------------------------------------- changed files


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE", SHARD])
def test_a_folder_edited_since_it_was_validated_may_not_be_published(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert any(f"since it was validated ({name} changed)" in objection for objection in objections(folder))


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_one_flipped_byte_with_the_old_times_is_a_change(folder: Path, name: str) -> None:
    path, stat = folder / name, (folder / name).stat()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert any(f"({name} changed)" in objection for objection in objections(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "vocab.txt", "notes.md", "deep/er/model.py"])
def test_a_file_added_since_it_was_validated_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"late")
    assert any(f"({name} was added)" in objection for objection in objections(folder))
    (folder / name).unlink()
    assert objections(folder) == ()


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    (folder / "LICENSE").unlink()
    assert any("(LICENSE is gone)" in objection for objection in objections(folder))


@pytest.mark.parametrize("name", ["weights.pkl", "notes.md", "plots/other.png", "plots/drop.html"])
def test_a_file_among_the_records_that_no_stage_writes_is_refused(folder: Path, name: str) -> None:
    path = folder / "fp8pipe" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"late")
    assert only_objection(folder) == f"fp8pipe/{name} is no record of a release; remove it"


def test_a_copy_of_the_folder_may_be_published_with_the_same_evidence(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copyfile)
    assert objections(copied) == ()


def test_a_folder_validated_but_not_measured_again_may_not_be_published(folder: Path) -> None:
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    validation(folder).save(folder / "fp8pipe" / "validation.json")
    assert "is not the one that was measured" in only_objection(folder)


def test_a_validation_of_the_headers_alone_does_not_allow_publishing(folder: Path) -> None:
    validation(folder).model_copy(update={"depth": "headers"}).save(folder / "fp8pipe" / "validation.json")
    assert "only its headers were validated" in only_objection(folder)


def test_a_refusal_lists_every_objection(folder: Path) -> None:
    finding = Finding(check="K2", severity="error", expected="scale", found="none", remedy="rerun quantize")
    validation(folder).model_copy(update={"findings": (finding,)}).save(folder / "fp8pipe" / "validation.json")
    gate_again(folder, **REJECTED)
    edit(folder, unchecked=("kernels",))
    with pytest.raises(Refused) as error:
        require_publishable(folder)
    assert all(words in str(error.value) for words in ("K2", "rejected", "unchecked: kernels"))


@pytest.mark.parametrize("counts", [REJECTED, INCONCLUSIVE])
def test_a_verdict_against_publishing_is_an_answer_to_a_flow_and_not_an_error(
    folder: Path, counts: dict[str, int]
) -> None:
    gate_again(folder, **counts)
    assert not stages.may_publish(folder)
