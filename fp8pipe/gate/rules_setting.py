"""Rules about the setting: both sides asked the same questions in the same way, on a device where it counts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fp8pipe.gate.evidence import Evidence, Outcome, differences, passed, same, settled, unchecked, vetoed

_LIBRARIES = ("vllm", "lm_eval", "transformers")
"""Libraries whose version decides what a prompt is and how it is answered."""


def suite(evidence: Evidence) -> Outcome:
    """One suite measured both, and it is the one that was given."""
    given, ours, theirs = evidence.suite, evidence.baseline, evidence.candidate
    if given is not None and given.name != theirs.suite:
        return vetoed(f"the candidate was measured with suite {theirs.suite}, not {given.name}")
    return same("suite", _named(ours.suite, ours.suite_digest), _named(theirs.suite, theirs.suite_digest))


def _named(name: str, digest: str) -> str:
    return f"{name} ({digest[:12]})" if digest else ""


def versions(evidence: Evidence) -> Outcome:
    """Task versions, and the versions of the libraries that build prompts and answer them."""
    problems = list(differences(evidence, "task version", lambda task: task.version))
    ours, theirs = evidence.baseline.versions, evidence.candidate.versions
    for library in _LIBRARIES:
        if library in ours and library in theirs and ours[library] != theirs[library]:
            problems.append(f"{library} {ours[library]} in the baseline, {theirs[library]} in the candidate")
    lacking = [library for library in _LIBRARIES if library not in ours or library not in theirs]
    if lacking and not problems:
        return unchecked(f"versions not recorded on both sides: {', '.join(lacking)}")
    listed = ", ".join(f"{library} {ours[library]}" for library in _LIBRARIES if library in ours)
    return settled(problems, f"the same task versions and {listed} on both sides")


def templates(evidence: Evidence) -> Outcome:
    """The same chat template was applied, or none on both sides."""
    ours, theirs = evidence.baseline.chat_template_hash, evidence.candidate.chat_template_hash
    if ours != theirs:
        return vetoed(f"the chat template differs: baseline {ours or 'none'}, candidate {theirs or 'none'}")
    return passed(f"the chat template is the same: {ours or 'none'}")


def seeds(evidence: Evidence) -> Outcome:
    """The same seeds."""
    return same("set of seeds", _items(evidence.baseline.seeds), _items(evidence.candidate.seeds))


def _items(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {values[key]}" for key in sorted(values))


def shots(evidence: Evidence) -> Outcome:
    """The same number of examples in every prompt."""
    listed = ", ".join(f"{name} {ours.num_fewshot}" for name, ours, _ in evidence.pairs())
    return settled(differences(evidence, "shots", lambda task: task.num_fewshot), f"shots: {listed}")


def bos(evidence: Evidence) -> Outcome:
    """A beginning-of-sequence token on both sides, or on neither."""
    ours, theirs = evidence.baseline.add_bos_token, evidence.candidate.add_bos_token
    return same("beginning-of-sequence setting", _on(ours), _on(theirs))


def _on(flag: bool | None) -> str | None:
    return None if flag is None else "on" if flag else "off"


def context(evidence: Evidence) -> Outcome:
    """The same context length."""
    ours, theirs = evidence.baseline.engine.max_model_len, evidence.candidate.engine.max_model_len
    return same("context length", ours or None, theirs or None)


def tokenizer(evidence: Evidence) -> Outcome:
    """The same tokenizer, as loaded."""
    return same("tokenizer", evidence.baseline.tokenizer_hash, evidence.candidate.tokenizer_hash)


def dtype(evidence: Evidence) -> Outcome:
    """The same dtype for everything that is not quantized."""
    return same("dtype", evidence.baseline.engine.dtype, evidence.candidate.engine.dtype)


def device(evidence: Evidence) -> Outcome:
    """Both on one class of device, and on one where the policy lets a verdict count."""
    ours, theirs = evidence.baseline.engine.device_class, evidence.candidate.engine.device_class
    answer = same("device class", ours, theirs)
    allowed = evidence.policy.device_classes
    if answer.outcome == "passed" and theirs not in allowed:
        return vetoed(
            f"measured on {theirs}; policy {evidence.policy.name} lets verdicts count on {', '.join(allowed)}"
        )
    return answer


def chance(evidence: Evidence) -> Outcome:
    """The baseline does better than chance: where it does not, no drop can show."""
    problems, unnamed = [], []
    for name, wanted in evidence.policy.gated:
        task, label = evidence.baseline.task(name), evidence.policy.label(name, wanted)
        metric = task.samples_of(wanted.metric, wanted.filter) if task is not None else None
        if wanted.min_baseline is None:
            unnamed.append(label)
        elif metric is not None and math.isfinite(metric.mean):
            above = metric.mean > wanted.min_baseline
            if above != metric.higher_is_better or metric.mean == wanted.min_baseline:
                problems.append(f"{label}: baseline {metric.mean:.4g} is no better than {wanted.min_baseline:.4g}")
    if unnamed and not problems:
        return unchecked(f"policy {evidence.policy.name} names no min_baseline for {', '.join(unnamed)}")
    return settled(problems, "the baseline is above chance on every task")
