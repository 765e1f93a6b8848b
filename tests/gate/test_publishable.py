"""May a folder be published? Every objection, and the same answer to everyone who asks."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.reports import policy
from support.sample_folders import approve_as_is, decide_again, measured, validation, write_checkpoint

from fp8pipe import stages
from fp8pipe.errors import Refused
from fp8pipe.gate.publishable import objections, require_publishable
from fp8pipe.records import Finding

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


@pytest.mark.parametrize("record", ["checkpoint", "validation", "candidate", "gate"])
def test_without_one_of_its_records_a_folder_may_not_be_published(folder: Path, record: str) -> None:
    path = folder / "fp8pipe" / f"{record}.json"
    content = path.read_bytes()
    path.unlink()
    assert f"{record}.json" in only_objection(folder)
    path.write_bytes(content[:-20])
    assert f"{record}.json" in only_objection(folder)
    with pytest.raises(Refused, match=rf"{record}\.json"):
        stages.may_publish(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verdict": "rejected", "reason": "dropped 3 points"}, "rejected it: dropped 3 points"),
        ({"vetoed": ("tokenizer",)}, "rejected"),
        ({"unchecked": ("kernels",)}, "unchecked: kernels"),
        ({"unchecked": ("speed", "memory")}, "unchecked: speed, memory"),
        ({"candidate_fingerprint": "cd34" * 16}, "decided on checkpoint cd34cd34cd34, but this is ab12ab12ab12"),
        ({"verdict": "inconclusive", "reason": "too few samples"}, "there is no approval: too few samples"),
    ],
)
def test_a_decision_that_does_not_accept_this_very_checkpoint_is_an_objection(
    folder: Path, changes: dict[str, object], words: str
) -> None:
    decide_again(folder, **changes)
    assert words in only_objection(folder)
    with pytest.raises(Refused, match=words) as error:
        require_publishable(folder)
    assert error.value.exit_code == 1


def test_a_rejected_checkpoint_may_not_be_published_even_with_an_approval(folder: Path) -> None:
    approve_as_is(folder, decide_again(folder, verdict="rejected"))
    assert "rejected" in only_objection(folder)
    assert not stages.may_publish(folder)


def test_an_approval_counts_for_its_own_decision_only(folder: Path) -> None:
    asking = policy(on_inconclusive="ask")
    (folder / "fp8pipe" / "policy.json").write_text(asking.model_dump_json())
    inconclusive = {"verdict": "inconclusive", "policy_digest": asking.digest()}
    approve_as_is(folder, decide_again(folder, **inconclusive, reason="too few samples"))
    assert objections(folder) == ()
    assert stages.may_publish(folder)
    decide_again(folder, **inconclusive, reason="still too few")
    assert "approval is of another decision" in only_objection(folder)
    assert not stages.may_publish(folder)


def test_an_approval_counts_only_under_the_policy_that_lets_people_decide(folder: Path) -> None:
    stopping, asking = policy(), policy(on_inconclusive="ask")
    approve_as_is(folder, decide_again(folder, verdict="inconclusive", policy_digest=stopping.digest()))
    for written, words in (
        (stopping.model_dump_json(), "stops at an inconclusive result"),
        (asking.model_dump_json(), "not the policy that the gate decided by"),
        ("{", "missing or not a policy"),
    ):
        (folder / "fp8pipe" / "policy.json").write_text(written)
        assert words in only_objection(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SHARD])
def test_a_folder_edited_since_it_was_validated_may_not_be_published(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert any("changed since it was validated" in objection for objection in objections(folder))


def test_a_folder_validated_but_not_measured_again_may_not_be_published(folder: Path) -> None:
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    validation(folder).save(folder / "fp8pipe" / "validation.json")
    assert "changed since it was measured" in only_objection(folder)


def test_a_measurement_that_the_gate_did_not_see_is_an_objection(folder: Path) -> None:
    measured(folder).model_copy(update={"suite": "easier"}).save(folder / "fp8pipe" / "candidate.json")
    assert "not the measurement that the gate decided on" in only_objection(folder)


def test_a_validation_of_the_headers_alone_does_not_allow_publishing(folder: Path) -> None:
    validation(folder).model_copy(update={"depth": "headers"}).save(folder / "fp8pipe" / "validation.json")
    assert "only its headers were validated" in only_objection(folder)


def test_a_refusal_lists_every_objection(folder: Path) -> None:
    finding = Finding(check="K2", severity="error", expected="scale", found="none", remedy="rerun quantize")
    validation(folder).model_copy(update={"findings": (finding,)}).save(folder / "fp8pipe" / "validation.json")
    decide_again(folder, verdict="rejected", unchecked=("kernels",))
    with pytest.raises(Refused) as error:
        require_publishable(folder)
    assert all(words in str(error.value) for words in ("K2", "rejected", "unchecked: kernels"))


@pytest.mark.parametrize("verdict", ["rejected", "inconclusive"])
def test_a_verdict_against_publishing_is_an_answer_to_a_flow_and_not_an_error(folder: Path, verdict: str) -> None:
    decide_again(folder, verdict=verdict, unchecked=("kernels",))
    assert not stages.may_publish(folder)


def test_anything_else_against_an_accepted_checkpoint_is_an_error_to_a_flow(folder: Path) -> None:
    decide_again(folder, unchecked=("kernels",))
    with pytest.raises(Refused, match="unchecked: kernels"):
        stages.may_publish(folder)
