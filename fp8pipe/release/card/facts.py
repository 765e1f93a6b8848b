"""Everything that a card says, and where a checkpoint folder keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.config import EvalSuite, GatePolicy, Recipe
from fp8pipe.gate.publishable import read_approval, read_policy, read_suite
from fp8pipe.hub.source_card import SourceCard, parse_source_card
from fp8pipe.model.untrusted import parse_config
from fp8pipe.records import (
    RECORD_DIR,
    Approval,
    Checkpoint,
    EvalReport,
    GateDecision,
    Snapshot,
    Terms,
    ValidationReport,
)
from fp8pipe.records.paths import record_path
from fp8pipe.records.published import PublishedScore, PublishedScores

if TYPE_CHECKING:
    from fp8pipe.quantize.plan import SummaryRow
    from fp8pipe.records.calibration import Calibration

RECORDS = {
    "gate.json": "the verdict, with every number compared and one reason per rule",
    "policy.json": "margins, alpha and limits of the gate",
    "suite.json": "what was asked of both models, and how",
    "baseline.json.gz": "the BF16 source, sample by sample",
    "candidate.json.gz": "this checkpoint, sample by sample",
    "validation.json": "every structural check and finding",
    "plan.json": "every tensor: kept or quantized, how, why, where",
    "calibration.json": "activation and KV ranges, and the samples they come from",
    "checkpoint.json": "fingerprint, source commit, sizes",
    "conversion.json": "the checkpoint that this one was converted from, and what was changed",
    "source.json": "the source's files with their hashes",
    "environment.json": "where both were measured: versions, device, driver",
    "provenance.json": "how it was made: in-toto, SLSA",
    "recipe.yaml": "the recipe in llm-compressor's words",
    "manifest.json": "sha256 of every published file",
    "approval.json": "who released an inconclusive result, when and why",
    "source_card.md": "the source's own card",
    "terms.json": "the source's licence, and what it asks of a copy",
    "published.json": "scores of the source that others publish",
    "card_template.md.j2": "the template of this card",
}
"""Records that a release may carry in fp8pipe/, the most important first, and what each holds."""

PLOTS = {
    "drop": "Drop against the margin",
    "accuracy": "Accuracy per task",
    "flips": "Samples that changed",
    "modules": "Layers, by their distance from BF16",
}
"""Titles of the plots, in the order of the card."""


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says."""

    repo_id: str
    tag: str
    """The tag of the release."""
    source: Snapshot
    source_card: SourceCard
    terms: Terms
    recipe: Recipe
    checkpoint: Checkpoint
    plan_summary: Sequence[SummaryRow]
    calibration: Calibration | None
    validation: ValidationReport
    baseline: EvalReport
    candidate: EvalReport
    decision: GateDecision
    policy: GatePolicy | None = None
    suite: EvalSuite | None = None
    approval: Approval | None = None
    notes: Sequence[str] = ()
    """The plan's notes."""
    plots: Mapping[str, str] = field(default_factory=dict)
    """Name of a plot, as in PLOTS -> its path in the repository."""
    records: Sequence[str] = ()
    """Names of the files in fp8pipe/."""
    files: Sequence[str] = ()
    """Names of the files beside the weights."""
    config: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON
    """The checkpoint's config.json."""
    chat_template: str = ""
    """Empty without one."""
    template: str | None = None
    """A team's own template; None: the shipped one."""
    published: Sequence[PublishedScore] = ()
    """What others give as the source's scores."""

    @property
    def fp8_cache(self) -> bool:
        """Whether the candidate was measured with an FP8 KV cache."""
        return self.candidate.engine.kv_cache_dtype.startswith("fp8")

    @property
    def asks_for_cache(self) -> bool:
        """Whether vLLM uses an FP8 KV cache for this checkpoint by itself: it reads `kv_cache_scheme` under
        compressed-tensors (model_executor/layers/attention/attention.py), and no key of the fp8 method."""
        return self.recipe.kv_cache is not None and self.recipe.checkpoint_format == "compressed-tensors"


def facts_of_folder(folder: Path, *, repo_id: str, tag: str) -> CardFacts:
    """Read the facts from DIR/fp8pipe/. InputError names a record that is missing."""
    from fp8pipe.quantize.plan import Plan
    from fp8pipe.records.calibration import Calibration

    checkpoint = Checkpoint.load(record_path(folder, "checkpoint"))
    plan = Plan.load(record_path(folder, "plan"))
    source_card, records = record_path(folder, "source_card"), folder / RECORD_DIR
    return CardFacts(
        repo_id=repo_id,
        tag=tag,
        source=Snapshot.load(record_path(folder, "source")),
        source_card=parse_source_card(source_card.read_text(errors="replace") if source_card.is_file() else None),
        terms=Terms.load(record_path(folder, "terms")),
        recipe=plan.settings,
        checkpoint=checkpoint,
        plan_summary=plan.summary(),
        notes=plan.notes,
        calibration=Calibration.load(record_path(folder, "calibration")) if checkpoint.calibration_digest else None,
        validation=ValidationReport.load(record_path(folder, "validation")),
        baseline=EvalReport.load(record_path(folder, "baseline")),
        candidate=EvalReport.load(record_path(folder, "candidate")),
        decision=GateDecision.load(record_path(folder, "gate")),
        policy=read_policy(folder),
        suite=read_suite(folder),
        approval=read_approval(folder),
        plots={name: f"{RECORD_DIR}/plots/{name}.png" for name in PLOTS if (records / f"plots/{name}.png").is_file()},
        # The manifest is written after the card, because it lists it.
        records=[name for name in RECORDS if name == "manifest.json" or (records / name).is_file()],
        files=sorted(path.name for path in folder.iterdir() if path.is_file()),
        config=_json(folder / "config.json"),
        chat_template=_chat_template(folder),
        template=template.read_text() if (template := record_path(folder, "card_template")).is_file() else None,
        published=PublishedScores.load(record_path(folder, "published")).scores,
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a small file of the checkpoint; empty if there is none."""
    value = parse_config(path.read_bytes())[0] if path.is_file() else None
    return value or {}


def _chat_template(folder: Path) -> str:
    """The template that a chat uses: the file, or the (default) one in the tokenizer's config."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(errors="replace")
    given = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(given, list):
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else ""
