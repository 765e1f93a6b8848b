"""The facts of a release, a folder that holds them, and how to read the card made of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from fp8pipe.config import GatePolicy, LicenceClaim, load_licences
from fp8pipe.gate import decide
from fp8pipe.hub.source_card import parse_source_card
from fp8pipe.quantize.plan import SummaryRow
from fp8pipe.records import (
    RECORD_FILES,
    EvalReport,
    Finding,
    Snapshot,
    ValidationReport,
)
from fp8pipe.records.calibration import Calibration
from fp8pipe.records.published import PublishedScores
from fp8pipe.release.card.facts import PLOTS, CardFacts
from fp8pipe.release.licence import settle
from fp8pipe.release.plots import write_plots
from support.reports import (
    SOURCE_COMMIT,
    checkpoint,
    pair,
    policy,
    recipe,
    suite,
)
from support.sample_folders import plan

TAG = "fp8-ab12cd34-1"

SOURCE_CARD_TEXT = """---
license: Apache 2.0
language: [English, de]
pipeline_tag: text-generation
extra_gated_prompt: sign here
---
# Tiny
"""


def calibration(**fields: Any) -> Calibration:
    """A calibration on 128 samples of a Hub dataset."""
    known = {
        "key": "k" * 64,
        "model_id": "acme/tiny",
        "source_commit": SOURCE_COMMIT,
        "dataset": "acme/chats",
        "dataset_revision": "9" * 40,
        "dataset_split": "train",
        "sample_indices": tuple(range(128)),
        "token_ids_sha256": "b" * 64,
        "tokens": 12_345,
        "max_seq_len": 256,
        "seed": 42,
        "observers": {},
        "device_class": "cpu",
        "versions": {"torch": "2.13.0"},
        "threads": 2,
        "seconds": 3.0,
    }
    return Calibration(**(known | fields))


def validation(*findings: Finding) -> ValidationReport:
    """A validation with these findings."""
    return ValidationReport(
        folder_identity="i" * 64,
        depth="fidelity",
        checks=("F1", "F2", "K3"),
        findings=findings,
        tensors=37,
        bytes_read=1_100_000,
    )


def licensed(card: str | None, claim: LicenceClaim | None = None) -> dict[str, Any]:
    """The fields of CardFacts that follow from the source's card and the shipped table of licences."""
    source_card = parse_source_card(card)
    return {"source_card": source_card, "terms": settle(source_card, load_licences(), claim)}


def facts_of(
    sides: tuple[EvalReport, EvalReport] | None = None, rules: GatePolicy | None = None, **more: Any
) -> CardFacts:
    """Facts of an accepted release with a drop of 0.4 points; `more` replaces fields."""
    baseline, candidate = sides or pair(lost=34, won=26)
    names = tuple(t.task for t in baseline.tasks)
    asked = suite(len(baseline.tasks[0].doc_ids), *names)
    decision = decide(
        baseline, candidate, rules or policy(*names), checkpoint=checkpoint(), suite=asked, recipe=recipe()
    )
    known: dict[str, Any] = {
        "repo_id": "acme/tiny-FP8-KV",
        "tag": TAG,
        "source": Snapshot(model_id="acme/tiny", commit=SOURCE_COMMIT, files=()),
        **licensed(SOURCE_CARD_TEXT),
        "recipe": recipe(),
        "checkpoint": checkpoint(),
        "plan_summary": (SummaryRow("quantize", "Linear", 28, 1_800_000, 900_000),),
        "calibration": calibration(),
        "validation": validation(),
        "baseline": baseline,
        "candidate": candidate,
        "decision": decision,
        "plots": {name: f"fp8pipe/plots/{name}.png" for name in PLOTS},
        "records": ("gate.json", "candidate.json.gz"),
    }
    return CardFacts(**(known | more))


def saved(folder: Path) -> CardFacts:
    """Write a checkpoint folder's records, as the stages leave them."""
    facts = facts_of()
    records = folder / "fp8pipe"
    assert facts.calibration is not None
    for name, record in {
        "checkpoint": facts.checkpoint,
        "plan": plan(),
        "source": facts.source,
        "calibration": facts.calibration,
        "validation": facts.validation,
        "baseline": facts.baseline,
        "candidate": facts.candidate,
        "gate": facts.decision,
        "terms": facts.terms,
        "published": PublishedScores(scores=()),
    }.items():
        record.save(records / RECORD_FILES[name])
    write_plots(facts.decision, facts.baseline, facts.candidate, records / "plots")
    (records / "source_card.md").write_text(SOURCE_CARD_TEXT)
    return facts


def commands(card: str) -> list[list[str]]:
    """Every command line in a bash block, split as a shell does."""
    blocks = re.findall(r"```bash\n(.*?)\n```", card, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def plain(card: str) -> str:
    """The card without its escapes."""
    return re.sub(r"\\(.)", r"\1", card)
