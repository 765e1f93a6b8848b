"""Rules about the setting: both sides asked the same questions in the same way, on a device that the policy accepts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fp8pipe.config import Parallel
from fp8pipe.gate.rules.pair import Pair, Ruling, differences, passed, same, settled, unchecked, vetoed

_LIBRARIES = ("vllm", "lm_eval", "transformers")
"""Libraries whose version can change a prompt or its answer."""


def suite(pair: Pair) -> Ruling:
    """Both sides were measured with one suite, the one that was given."""
    given, ours, theirs = pair.suite, pair.baseline, pair.candidate
    if given is not None and given.name != theirs.suite:
        return vetoed(f"the candidate was measured with suite {theirs.suite}, not {given.name}")
    return same("suite", _named(ours.suite, ours.suite_digest), _named(theirs.suite, theirs.suite_digest))


def _named(name: str, digest: str) -> str:
    return f"{name} ({digest[:12]})" if digest else ""


def versions(pair: Pair) -> Ruling:
    """Both sides have the same versions of the tasks and of the libraries that build and answer prompts."""
    problems = list(differences(pair, "task version", lambda task: task.version))
    ours, theirs = pair.baseline.versions, pair.candidate.versions
    for library in _LIBRARIES:
        if library in ours and library in theirs and ours[library] != theirs[library]:
            problems.append(f"{library} {ours[library]} in the baseline, {theirs[library]} in the candidate")
    lacking = [library for library in _LIBRARIES if library not in ours or library not in theirs]
    if lacking and not problems:
        return unchecked(f"versions not recorded on both sides: {', '.join(lacking)}")
    listed = ", ".join(f"{library} {ours[library]}" for library in _LIBRARIES if library in ours)
    return settled(problems, f"the same task versions and {listed} on both sides")


def templates(pair: Pair) -> Ruling:
    """Both sides applied the same chat template, or none."""
    ours, theirs = pair.baseline.chat_template_hash, pair.candidate.chat_template_hash
    if ours != theirs:
        return vetoed(f"the chat template differs: baseline {ours or 'none'}, candidate {theirs or 'none'}")
    return passed(f"the chat template is the same on both sides: {ours or 'none'}")


def seeds(pair: Pair) -> Ruling:
    """Both sides used the same seeds."""
    return same("set of seeds", _items(pair.baseline.seeds), _items(pair.candidate.seeds))


def _items(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {values[key]}" for key in sorted(values))


def shots(pair: Pair) -> Ruling:
    """Both sides put the same number of examples into each prompt."""
    listed = ", ".join(f"{name} {ours.num_fewshot}" for name, ours, _ in pair.tasks())
    return settled(differences(pair, "shots", lambda task: task.num_fewshot), f"shots: {listed}")


def bos(pair: Pair) -> Ruling:
    """Both sides added a beginning-of-sequence token, or neither did."""
    ours, theirs = pair.baseline.add_bos_token, pair.candidate.add_bos_token
    return same("beginning-of-sequence setting", _on(ours), _on(theirs))


def _on(flag: bool | None) -> str | None:
    return None if flag is None else "on" if flag else "off"


def context(pair: Pair) -> Ruling:
    """Both sides had the same context length."""
    ours, theirs = pair.baseline.engine.max_model_len, pair.candidate.engine.max_model_len
    return same("context length", ours or None, theirs or None)


def tokenizer(pair: Pair) -> Ruling:
    """Both sides loaded the same tokenizer."""
    return same("tokenizer", pair.baseline.tokenizer_hash, pair.candidate.tokenizer_hash)


def dtype(pair: Pair) -> Ruling:
    """Both sides used the same dtype for everything that is not quantized."""
    return same("dtype", pair.baseline.engine.dtype, pair.candidate.engine.dtype)


def device(pair: Pair) -> Ruling:
    """Both sides ran on one device class, and the policy names it."""
    ours, theirs = pair.baseline.engine.device_class, pair.candidate.engine.device_class
    answer = same("device class", ours, theirs)
    allowed = pair.policy.device_classes
    if answer.outcome == "passed" and theirs not in allowed:
        return vetoed(f"measured on {theirs}, but policy {pair.policy.name} accepts only {', '.join(allowed)}")
    return answer


def parallelism(pair: Pair) -> Ruling:
    """Both sides were spread over devices in the same way, which decides in what order numbers are added up."""
    ours, theirs = (Parallel.of(side.engine.arguments) for side in (pair.baseline, pair.candidate))
    return same("parallelism", str(ours), str(theirs))


def chance(pair: Pair) -> Ruling:
    """The baseline is better than chance: a model that guesses has nothing to lose."""
    problems, unnamed = [], []
    for name, wanted in pair.policy.gated:
        task, label = pair.baseline.task(name), pair.policy.label(name, wanted)
        metric = task.samples_of(wanted.metric, wanted.filter) if task is not None else None
        if wanted.min_baseline is None:
            unnamed.append(label)
        elif metric is not None and math.isfinite(metric.mean):
            above = metric.mean > wanted.min_baseline
            if above != metric.higher_is_better or metric.mean == wanted.min_baseline:
                problems.append(f"{label}: baseline {metric.mean:.4g} is no better than {wanted.min_baseline:.4g}")
    if unnamed and not problems:
        return unchecked(f"policy {pair.policy.name} names no min_baseline for {', '.join(unnamed)}")
    return settled(problems, "the baseline is above chance on every task")
