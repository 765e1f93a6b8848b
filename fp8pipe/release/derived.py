"""Files that a release makes of its evidence for the tools of others. The same records give the same bytes: anyone can
make them again, and `verify` does.

    fp8pipe/provenance.json      how it was made: in-toto, SLSA
    fp8pipe/recipe.yaml          the recipe in llm-compressor's words, where it has words for it
    fp8pipe/environment.json     where both models were measured: versions, device, driver
    .eval_results/*.yaml         the scores, as the Hub reads them for its leaderboards
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fp8pipe.gate.publishable import Evidence
from fp8pipe.hub.model_card import leaderboard_entry
from fp8pipe.model.identity import RESULTS
from fp8pipe.model.untrusted import parse_config
from fp8pipe.records import RECORD_DIR, RECORD_FILES, EvalReport, FileHash, TaskDecision
from fp8pipe.release.card.published import DATASETS
from fp8pipe.release.card.scheme import llmcompressor_recipe
from fp8pipe.release.provenance import provenance
from fp8pipe.release.scores import in_points


def derived(folder: Path, evidence: Evidence, files: Sequence[FileHash]) -> dict[str, bytes]:
    """Name in the release -> content. files: the release's, with their hashes; `folder` has the small ones."""
    found = {
        "provenance": provenance(folder, evidence, files),
        "recipe": llmcompressor_recipe(evidence.plan.settings, _config(folder)).encode(),
        "environment": environment(evidence.baseline, evidence.candidate),
    }
    records = {f"{RECORD_DIR}/{RECORD_FILES[name]}": content for name, content in found.items() if content}
    return records | dict(_results(evidence))


def is_derived(name: str) -> bool:
    """Whether a published file of this name is one of these."""
    return name.startswith(RESULTS) or name in {
        f"{RECORD_DIR}/{RECORD_FILES[one]}" for one in ("provenance", "recipe", "environment")
    }


def environment(baseline: EvalReport, candidate: EvalReport) -> bytes:
    """Where both models were measured, as JSON."""
    content = {
        report.role: {
            "device_class": report.engine.device_class,
            "device": report.engine.device_name,
            "devices": max(1, len(report.engine.gpus)),
            "kernels": list(report.engine.linear_kernels),
            "attention": report.engine.attention_backend,
            "versions": report.versions,
            "machine": report.machine,
        }
        for report in (baseline, candidate)
    }
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"


def _results(evidence: Evidence) -> Iterator[tuple[str, bytes]]:
    """One file for each gated task that the Hub has a leaderboard of, if all its documents were scored as there."""
    decision, named = evidence.decision, set[str]()
    for task in decision.tasks:
        dataset = DATASETS.get(task.task)
        if dataset is None or dataset.benchmark is None or task.task in named or not _is_whole(evidence, task):
            continue
        named.add(task.task)
        notes = f"FP8 checkpoint, {_setup(evidence.candidate, task)}"
        value = round(100 * task.candidate, 2)
        content = leaderboard_entry(dataset.id, dataset.benchmark, value, notes)
        yield f"{RESULTS}{task.task}.yaml", content


def _is_whole(evidence: Evidence, task: TaskDecision) -> bool:
    """Whether it is a share of right answers over all documents of the task."""
    found = evidence.candidate.task(task.task)
    return in_points(task) and found is not None and found.available == len(found.doc_ids)


def _setup(report: EvalReport, task: TaskDecision) -> str:
    """How a task was scored, in one line."""
    found = report.task(task.task)
    assert found is not None
    engine = f"vLLM {report.versions.get('vllm', '?')} on {report.engine.device_class}"
    filtered = "" if task.filter == "none" else f" ({task.filter})"
    template = ", chat template" if report.chat_template_hash else ""
    lm_eval = report.versions.get("lm_eval", "?")
    return f"{found.num_fewshot}-shot{template}, {task.metric}{filtered}, lm-eval {lm_eval}, {engine}"


def _config(folder: Path) -> dict[str, Any]:  # Any: JSON
    path = folder / "config.json"
    return (parse_config(path.read_bytes())[0] if path.is_file() else None) or {}
