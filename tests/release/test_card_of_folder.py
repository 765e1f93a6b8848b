"""The card of a checkpoint folder: read from its records, always the same, refused where the verdict forbids it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.cards import TAG, calibration, facts_of, plain, saved
from support.reports import checkpoint, pair, policy

from fp8pipe.errors import InputError, Refused
from fp8pipe.records import Approval, GateDecision
from fp8pipe.release.card import card_for_folder, collection_note, render_card
from fp8pipe.release.card.facts import RECORDS


def test_the_card_of_a_folder_is_the_same_before_and_after_it_replaced_the_sources_own(tmp_path: Path) -> None:
    saved(tmp_path)
    first = card_for_folder(tmp_path, repo_id="acme/tiny-FP8-KV", tag=TAG)
    (tmp_path / "README.md").write_text(first)
    assert card_for_folder(tmp_path, repo_id="acme/tiny-FP8-KV", tag=TAG) == first
    assert yaml.safe_load(first.split("---\n")[1])["license"] == "apache-2.0"
    assert "fp8pipe/plots/drop.png" in first


def test_the_card_of_a_folder_lists_the_records_that_it_holds(tmp_path: Path) -> None:
    saved(tmp_path)
    listed = set(
        re.findall(r"`fp8pipe/([\w.]+)`", card_for_folder(tmp_path, repo_id="a/b", tag=TAG).split("## Evidence")[1])
    )
    held = {path.name for path in (tmp_path / "fp8pipe").iterdir() if path.is_file()}
    assert listed == held | {"manifest.json"}
    assert listed <= set(RECORDS)


def test_the_card_of_a_converted_checkpoint_lists_the_record_of_the_conversion(tmp_path: Path) -> None:
    saved(tmp_path)
    assert "conversion.json" not in card_for_folder(tmp_path, repo_id="a/b", tag=TAG)
    (tmp_path / "fp8pipe" / "conversion.json").write_text("{}")
    assert "| `fp8pipe/conversion.json` |" in card_for_folder(tmp_path, repo_id="a/b", tag=TAG)


def test_a_folder_without_a_decision_is_an_error_that_names_the_record(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "fp8pipe" / "gate.json").unlink()
    with pytest.raises(InputError, match=r"gate\.json"):
        card_for_folder(tmp_path, repo_id="a/b", tag=TAG)


def test_a_decision_read_back_from_its_file_gives_the_same_card(tmp_path: Path) -> None:
    facts = facts_of()
    again = GateDecision.load(facts.decision.save(tmp_path / "gate.json"))
    assert render_card(replace(facts, decision=again)) == render_card(facts)


def test_the_same_records_render_to_the_same_bytes_however_long_they_took() -> None:
    facts = facts_of()
    slower = checkpoint(seconds=99.0)
    again = facts_of(
        checkpoint=slower,
        baseline=facts.baseline.model_copy(update={"seconds": {"total": 77.0}}),
        candidate=facts.candidate.model_copy(update={"seconds": {"total": 88.0}}),
        calibration=calibration(seconds=55.0),
        decision=facts.decision,
    )
    assert render_card(facts) == render_card(again)


def test_a_rejected_checkpoint_gets_neither_card_nor_note() -> None:
    rejected = facts_of(pair(lost=200))
    assert rejected.decision.verdict == "rejected"
    with pytest.raises(Refused, match="rejected"):
        render_card(rejected)
    with pytest.raises(Refused, match="rejected"):
        collection_note(rejected.decision)


def test_an_inconclusive_result_needs_an_approval_of_this_very_decision() -> None:
    asking = policy(on_inconclusive="ask")
    open_facts = facts_of(pair(lost=70, won=35), asking, policy=asking)
    assert open_facts.decision.verdict == "inconclusive"
    with pytest.raises(Refused, match="approval"):
        render_card(open_facts)
    approval = Approval(who="ada", when="2026-08-01T10:00:00Z", reason="known noise", decision="0" * 64)
    with pytest.raises(Refused, match="approval"):
        render_card(replace(open_facts, approval=approval))
    signed = approval.model_copy(update={"decision": open_facts.decision.digest()})
    card = plain(render_card(replace(open_facts, approval=signed)))
    assert "**Inconclusive, released by decision.**" in card
    assert "ada released it on 2026-08-01T10:00:00Z: known noise" in card
    assert collection_note(open_facts.decision).startswith("Inconclusive, released by decision.")
