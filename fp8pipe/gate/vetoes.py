"""The rules that come before any statistics: whether the two reports measure the same thing, on the thing itself.

Each rule is one function from the evidence to an outcome with one line of reason. A broken rule is a veto; a rule whose
evidence is missing is `unchecked`, never passed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from fp8pipe.config import EvalSuite, GatePolicy, Recipe
from fp8pipe.records import Checkpoint, EvalReport, MetricSamples, RuleOutcome, TaskResult

MIN_RISE = 0.01
"""Rise in the share of failed extractions or truncations, above which it may veto: one point."""

_LIBRARIES = ("vllm", "lm_eval", "transformers")
"""Libraries whose version decides what a prompt is and how it is answered."""

_WEIGHT_ONLY = ("marlin", "humming", "a16", "cpufp8blockscaledmmkernel", "cpufp8pertensorscaledmmlinearkernel")
"""Parts of the names, in lower case, of vLLM's kernels that keep FP8 weights but multiply in 16 bits."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a rule may look at."""

    baseline: EvalReport
    candidate: EvalReport
    policy: GatePolicy
    checkpoint: Checkpoint | None
    suite: EvalSuite | None
    recipe: Recipe | None
    look: int

    def pairs(self) -> Iterator[tuple[str, TaskResult, TaskResult]]:
        """Name and both sides of every task that the policy names and both reports hold once."""
        for name in self.policy.tasks:
            ours, theirs = self.baseline.task(name), self.candidate.task(name)
            if ours is not None and theirs is not None:
                yield name, ours, theirs


@dataclass(frozen=True, slots=True)
class Outcome:
    """A rule's answer."""

    outcome: Literal["passed", "vetoed", "unchecked"]
    reason: str


Rule = Callable[[Evidence], Outcome]


def passed(reason: str) -> Outcome:
    return Outcome("passed", reason)


def vetoed(reason: str) -> Outcome:
    return Outcome("vetoed", reason)


def unchecked(reason: str) -> Outcome:
    return Outcome("unchecked", reason)


def apply_rules(evidence: Evidence) -> tuple[RuleOutcome, ...]:
    """Every rule, in order, whatever the others say."""
    answers = ((name, rule(evidence)) for name, rule in RULES.items())
    return tuple(RuleOutcome(rule=name, outcome=a.outcome, reason=a.reason) for name, a in answers)


def comparable(ours: MetricSamples | None, theirs: MetricSamples | None) -> bool:
    """Whether two metrics can be paired at all: present, finite, and of one length."""
    return (
        ours is not None
        and theirs is not None
        and len(ours.values) == len(theirs.values) > 0
        and all(map(math.isfinite, (*ours.values, *theirs.values)))
    )


# ---------------------------------------------------------------------------------------------- helpers


def _verdict(problems: Iterable[str], otherwise: str) -> Outcome:
    found = list(problems)
    return vetoed("; ".join(found)) if found else passed(otherwise)


def _same(what: str, ours: object, theirs: object) -> Outcome:
    """Both sides must name the same thing; an empty side is missing evidence."""
    if ours in ("", (), {}) or theirs in ("", (), {}):
        return unchecked(f"the {what} is not recorded on both sides")
    if ours != theirs:
        return vetoed(f"the {what} differs: baseline {ours}, candidate {theirs}")
    return passed(f"the {what} is the same on both sides: {ours}")


def _differences(evidence: Evidence, what: str, pick: Callable[[TaskResult], object]) -> Iterator[str]:
    for name, ours, theirs in evidence.pairs():
        if pick(ours) != pick(theirs):
            yield f"{name}: {what} {pick(ours)} in the baseline, {pick(theirs)} in the candidate"


# ---------------------------------------------------------------------------------------------- the measurement


def metrics(evidence: Evidence) -> Outcome:
    """Every task and metric of the policy exactly once on both sides, finite, and nothing that one side alone has."""
    problems = [
        problem
        for side in (evidence.baseline, evidence.candidate)
        for name in evidence.policy.tasks
        for problem in _task_problems(side, name, evidence.policy)
    ]
    problems.extend(_one_sided_tasks(evidence))
    problems.extend(_directions(evidence))
    return _verdict(problems, f"{len(evidence.policy.tasks)} gated task(s): each metric once, finite, on both sides")


def _task_problems(side: EvalReport, name: str, policy: GatePolicy) -> Iterator[str]:
    wanted = policy.tasks[name]
    count = sum(task.task == name for task in side.tasks)
    task = side.task(name)
    if task is None:
        yield f"{side.role} has {count or 'no'} results for task {name}, expected one"
        return
    found = [m for m in task.metrics if (m.metric, m.filter) == (wanted.metric, wanted.filter)]
    if len(found) != 1:
        present = ", ".join(sorted(f"{m.metric},{m.filter}" for m in task.metrics)) or "none"
        yield (
            f"{side.role} has {len(found) or 'no'} metrics {wanted.metric},{wanted.filter} for {name}, expected one "
            f"(there are: {present})"
        )
        return
    yield from _metric_problems(side.role, task, found[0])


def _metric_problems(role: str, task: TaskResult, metric: MetricSamples) -> Iterator[str]:
    where = f"{role} {task.task} {metric.metric}"
    if len(metric.values) != len(task.doc_ids) or not metric.values:
        yield f"{where}: {len(metric.values)} values for {len(task.doc_ids)} samples"
    bad = [i for i, value in enumerate(metric.values) if not math.isfinite(value)]
    if bad or not math.isfinite(metric.mean):
        place = f"value {metric.values[bad[0]]} at sample {bad[0]}, {len(bad)} in all" if bad else "the mean"
        yield f"{where}: not finite: {place}"
    elif metric.values:
        mean = math.fsum(metric.values) / len(metric.values)
        if not math.isclose(mean, metric.mean, rel_tol=1e-6, abs_tol=1e-9):
            yield f"{where}: reported {metric.mean:.6g}, but its samples average {mean:.6g}; a paired test needs a mean"


def _one_sided_tasks(evidence: Evidence) -> Iterator[str]:
    ours = {task.task for task in evidence.baseline.tasks}
    theirs = {task.task for task in evidence.candidate.tasks}
    for name in sorted(ours ^ theirs):
        yield f"task {name} is only in the {'baseline' if name in ours else 'candidate'}"


def _directions(evidence: Evidence) -> Iterator[str]:
    for name, ours, theirs in evidence.pairs():
        wanted = evidence.policy.tasks[name]
        one, other = (side.samples_of(wanted.metric, wanted.filter) for side in (ours, theirs))
        if one is not None and other is not None and one.higher_is_better != other.higher_is_better:
            yield f"{name}: higher is better on one side only"


def samples(evidence: Evidence) -> Outcome:
    """The same documents, prompts and targets, hash by hash, in the same order, none twice."""
    pairs = list(evidence.pairs())
    if not pairs:
        return unchecked("no task is on both sides")
    problems = [problem for pair in pairs for problem in _sample_problems(*pair)]
    bare = [f"{name} {kind}" for name, ours, theirs in pairs for kind in _missing_hashes(ours, theirs)]
    if bare and not problems:
        return unchecked(f"not recorded: {', '.join(bare)}")
    total = sum(len(ours.doc_ids) for _, ours, _ in pairs)
    return _verdict(problems, f"{total} samples, equal hash by hash: documents, prompts and targets")


_HASHES: dict[str, Callable[[TaskResult], tuple[str, ...]]] = {
    "document hashes": lambda task: task.doc_hashes,
    "prompt hashes": lambda task: task.prompt_hashes,
    "target hashes": lambda task: task.target_hashes,
}


def _missing_hashes(ours: TaskResult, theirs: TaskResult) -> list[str]:
    return [kind for kind, pick in _HASHES.items() if not pick(ours) or not pick(theirs)]


def _sample_problems(name: str, ours: TaskResult, theirs: TaskResult) -> Iterator[str]:
    for role, task in (("baseline", ours), ("candidate", theirs)):
        repeated = [str(i) for i, count in Counter(task.doc_ids).items() if count > 1]
        if repeated:
            yield f"{name}: {role} scored documents {_few(repeated)} more than once"
    if ours.doc_ids != theirs.doc_ids:
        yield f"{name}: {_how_documents_differ(ours.doc_ids, theirs.doc_ids)}"
        return
    for kind, pick in _HASHES.items():
        one, other = pick(ours), pick(theirs)
        if not one or not other:
            continue
        if {len(one), len(other)} != {len(ours.doc_ids)}:
            yield f"{name}: {len(one)} and {len(other)} {kind} for {len(ours.doc_ids)} samples"
            continue
        changed = [str(doc) for doc, a, b in zip(ours.doc_ids, one, other, strict=True) if a != b]
        if changed:
            yield f"{name}: {kind} differ for {len(changed)} samples, documents {_few(changed)}"
    if ours.clusters != theirs.clusters or len(ours.clusters) not in (0, len(ours.doc_ids)):
        yield f"{name}: samples are clustered differently on the two sides"


def _how_documents_differ(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    missing, extra = set(ours) - set(theirs), set(theirs) - set(ours)
    if not missing and not extra:
        return f"the same documents in another order or number ({len(ours)} and {len(theirs)})"
    parts = []
    if missing:
        parts.append(f"candidate lacks {len(missing)} documents ({_few(map(str, sorted(missing)))})")
    if extra:
        parts.append(f"candidate has {len(extra)} more ({_few(map(str, sorted(extra)))})")
    return ", ".join(parts)


def _few(items: Iterable[str]) -> str:
    listed = list(items)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def completeness(evidence: Evidence) -> Outcome:
    """As many samples as the suite asks for at this look."""
    if evidence.suite is None:
        return unchecked("the suite was not given, so the number of samples it asks for is not known")
    share = evidence.policy.looks[evidence.look - 1]
    problems = []
    for name, ours, theirs in evidence.pairs():
        spec = evidence.suite.tasks.get(name)
        if spec is None:
            problems.append(f"suite {evidence.suite.name} has no task {name}")
        elif spec.samples is not None:
            wanted = math.ceil(spec.samples * share)
            for role, task in (("baseline", ours), ("candidate", theirs)):
                if len(task.doc_ids) != wanted:
                    problems.append(f"{name}: {role} scored {len(task.doc_ids)} samples, the suite asks for {wanted}")
    return _verdict(problems, f"every task has the samples that suite {evidence.suite.name} asks for")


def suite(evidence: Evidence) -> Outcome:
    """One suite measured both, and it is the one that was given."""
    given, ours, theirs = evidence.suite, evidence.baseline, evidence.candidate
    if given is not None and given.name != theirs.suite:
        return vetoed(f"the candidate was measured with suite {theirs.suite}, not {given.name}")
    return _same("suite", _named(ours.suite, ours.suite_digest), _named(theirs.suite, theirs.suite_digest))


def _named(name: str, digest: str) -> str:
    return f"{name} ({digest[:12]})" if digest else ""


def versions(evidence: Evidence) -> Outcome:
    """Task versions, and the versions of the libraries that build prompts and answer them."""
    problems = list(_differences(evidence, "task version", lambda task: task.version))
    ours, theirs = evidence.baseline.versions, evidence.candidate.versions
    for library in _LIBRARIES:
        if library in ours and library in theirs and ours[library] != theirs[library]:
            problems.append(f"{library} {ours[library]} in the baseline, {theirs[library]} in the candidate")
    lacking = [library for library in _LIBRARIES if library not in ours or library not in theirs]
    if lacking and not problems:
        return unchecked(f"versions not recorded on both sides: {', '.join(lacking)}")
    listed = ", ".join(f"{library} {ours[library]}" for library in _LIBRARIES if library in ours)
    return _verdict(problems, f"the same task versions and {listed} on both sides")


def templates(evidence: Evidence) -> Outcome:
    """The same chat template was applied, or none on both sides."""
    ours, theirs = evidence.baseline.chat_template_hash, evidence.candidate.chat_template_hash
    if ours != theirs:
        return vetoed(f"the chat template differs: baseline {ours or 'none'}, candidate {theirs or 'none'}")
    return passed(f"the chat template is the same: {ours or 'none'}")


def seeds(evidence: Evidence) -> Outcome:
    """The same seeds."""
    return _same("set of seeds", _items(evidence.baseline.seeds), _items(evidence.candidate.seeds))


def _items(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {values[key]}" for key in sorted(values))


def shots(evidence: Evidence) -> Outcome:
    """The same number of examples in every prompt."""
    listed = ", ".join(f"{name} {ours.num_fewshot}" for name, ours, _ in evidence.pairs())
    return _verdict(_differences(evidence, "shots", lambda task: task.num_fewshot), f"shots: {listed}")


def bos(evidence: Evidence) -> Outcome:
    """A beginning-of-sequence token on both sides, or on neither."""
    ours, theirs = evidence.baseline.add_bos_token, evidence.candidate.add_bos_token
    return _same("beginning-of-sequence setting", _on(ours), _on(theirs))


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def context(evidence: Evidence) -> Outcome:
    """The same context length."""
    ours, theirs = evidence.baseline.engine.max_model_len, evidence.candidate.engine.max_model_len
    return _same("context length", ours, theirs)


def tokenizer(evidence: Evidence) -> Outcome:
    """The same tokenizer, as loaded."""
    return _same("tokenizer", evidence.baseline.tokenizer_hash, evidence.candidate.tokenizer_hash)


def dtype(evidence: Evidence) -> Outcome:
    """The same dtype for everything that is not quantized."""
    return _same("dtype", evidence.baseline.engine.dtype, evidence.candidate.engine.dtype)


def device(evidence: Evidence) -> Outcome:
    """Both on one class of device, and on one where the policy lets a verdict count."""
    ours, theirs = evidence.baseline.engine.device_class, evidence.candidate.engine.device_class
    same = _same("device class", ours, theirs)
    allowed = evidence.policy.device_classes
    if same.outcome == "passed" and theirs not in allowed:
        return vetoed(
            f"measured on {theirs}; policy {evidence.policy.name} lets verdicts count on {', '.join(allowed)}"
        )
    return same


def chance(evidence: Evidence) -> Outcome:
    """The baseline does better than chance: where it does not, no drop can show."""
    problems, unnamed = [], []
    for name, wanted in evidence.policy.tasks.items():
        task = evidence.baseline.task(name)
        metric = task.samples_of(wanted.metric, wanted.filter) if task is not None else None
        if wanted.min_baseline is None:
            unnamed.append(name)
        elif metric is not None and math.isfinite(metric.mean):
            above = metric.mean > wanted.min_baseline
            if above != metric.higher_is_better or metric.mean == wanted.min_baseline:
                problems.append(f"{name}: baseline {metric.mean:.4g} is no better than {wanted.min_baseline:.4g}")
    if unnamed and not problems:
        return unchecked(f"policy {evidence.policy.name} names no min_baseline for {', '.join(unnamed)}")
    return _verdict(problems, "the baseline is above chance on every task")


# ---------------------------------------------------------------------------------------------- the candidate


def fingerprint(evidence: Evidence) -> Outcome:
    """The candidate's report is about the checkpoint on disk, and the baseline's about the model it was made from."""
    checkpoint, baseline, candidate = evidence.checkpoint, evidence.baseline, evidence.candidate
    if checkpoint is None:
        return unchecked("no checkpoint was given to compare the candidate with")
    problems = []
    if (baseline.role, candidate.role) != ("baseline", "candidate"):
        problems.append(f"expected a baseline and a candidate report, found {baseline.role} and {candidate.role}")
    if candidate.fingerprint != checkpoint.fingerprint:
        problems.append(
            f"the candidate report is about {candidate.fingerprint}, the folder is {checkpoint.fingerprint}"
        )
    if baseline.fingerprint != checkpoint.source_commit:
        problems.append(f"the baseline report is about {baseline.fingerprint}, not source {checkpoint.source_commit}")
    if evidence.recipe is not None and evidence.recipe.name != checkpoint.recipe:
        problems.append(f"the checkpoint was made with recipe {checkpoint.recipe}, not {evidence.recipe.name}")
    return _verdict(problems, f"the candidate is checkpoint {checkpoint.fingerprint[:16]}, the baseline its source")


def kernels(evidence: Evidence) -> Outcome:
    """FP8 Linears were served by FP8 kernels on FP8 activations; a verdict on W8A16 is none on W8A8."""
    ours, theirs = evidence.baseline.engine, evidence.candidate.engine
    if ours.quantization is not None:
        return vetoed(f"the baseline was served quantized ({ours.quantization})")
    if theirs.quantization is None:
        if evidence.checkpoint is not None:
            return vetoed("the candidate was served without quantization")
        return unchecked("the candidate is not quantized: there is no FP8 kernel to look at")
    if not theirs.linear_kernels:
        return unchecked("the kernels that served the quantized Linears are not recorded")
    weight_only = evidence.recipe is not None and evidence.recipe.activations is None
    wrong = [name for name in theirs.linear_kernels if is_w8a8(name) == weight_only]
    served = ", ".join(theirs.linear_kernels)
    if wrong:
        wanted = "weight-only FP8" if weight_only else "FP8 W8A8"
        return vetoed(f"served by {', '.join(wrong)}, expected {wanted} kernels only")
    return passed(f"served by {served}")


def is_w8a8(kernel: str) -> bool:
    """Whether vLLM's kernel of this name multiplies FP8 weights by FP8 activations."""
    name = kernel.lower()
    return "fp8" in name and not any(part in name for part in _WEIGHT_ONLY)


def kv_cache(evidence: Evidence) -> Outcome:
    """The cache's dtype is the model's own in the baseline, and the recipe's in the candidate."""
    ours, theirs = evidence.baseline.engine.kv_cache_dtype, evidence.candidate.engine.kv_cache_dtype
    if ours.startswith("fp8"):
        return vetoed(f"the baseline's KV cache is {ours}")
    if evidence.recipe is None:
        return unchecked(f"the recipe was not given; the candidate's KV cache is {theirs}")
    wanted = evidence.recipe.kv_cache is not None
    if theirs.startswith("fp8") != wanted:
        return vetoed(
            f"recipe {evidence.recipe.name} has {'an' if wanted else 'no'} FP8 KV cache, served with {theirs}"
        )
    return passed(f"KV cache {theirs}, as recipe {evidence.recipe.name} has it; baseline {ours}")


def extraction(evidence: Evidence) -> Outcome:
    """The candidate does not fail to give an extractable answer much more often."""

    def flags(name: str, task: TaskResult) -> tuple[bool, ...]:
        wanted = evidence.policy.tasks[name]
        metric = task.samples_of(wanted.metric, wanted.filter)
        return metric.extraction_failed if metric is not None else ()

    return _rise(evidence, "failed extractions", flags)


def truncation(evidence: Evidence) -> Outcome:
    """The candidate does not run into the length limit much more often."""
    return _rise(evidence, "truncated generations", lambda name, task: task.truncated)


def _rise(evidence: Evidence, what: str, flags: Callable[[str, TaskResult], tuple[bool, ...]]) -> Outcome:
    from fp8pipe.gate.statistics import mcnemar_p  # scipy takes a second to import

    problems, seen = [], []
    for name, ours, theirs in evidence.pairs():
        before, after = flags(name, ours), flags(name, theirs)
        if len(before) != len(after) or len(before) not in (0, len(ours.doc_ids)):
            problems.append(
                f"{name}: {what} recorded for {len(before)} and {len(after)} of {len(ours.doc_ids)} samples"
            )
        elif before:
            new = sum(b and not a for a, b in zip(before, after, strict=True))
            gone = sum(a and not b for a, b in zip(before, after, strict=True))
            rise, p = (new - gone) / len(before), mcnemar_p(new, gone)
            seen.append(f"{name} {sum(before)} -> {sum(after)}")
            if p < evidence.policy.alpha and rise > MIN_RISE:
                problems.append(
                    f"{name}: {what} rose from {sum(before)} to {sum(after)} of {len(before)} "
                    f"({100 * rise:.1f} points, McNemar p {p:.2g})"
                )
    return _verdict(problems, f"{what}: {', '.join(seen)}" if seen else f"no gated task can have {what}")


def size(evidence: Evidence) -> Outcome:
    """The checkpoint is as small as the policy asks."""
    limit, checkpoint = evidence.policy.max_size_ratio, evidence.checkpoint
    if limit is None:
        return passed(f"policy {evidence.policy.name} sets no size limit")
    if checkpoint is None:
        return unchecked("no checkpoint was given to weigh")
    ratio = checkpoint.output_bytes / checkpoint.source_bytes
    reason = f"{checkpoint.output_bytes} of {checkpoint.source_bytes} bytes, ratio {ratio:.3f}"
    return passed(f"{reason}, limit {limit:g}") if ratio <= limit else vetoed(f"{reason} is above the limit {limit:g}")


RULES: dict[str, Rule] = {
    "metrics": metrics,
    "samples": samples,
    "completeness": completeness,
    "suite": suite,
    "versions": versions,
    "templates": templates,
    "seeds": seeds,
    "shots": shots,
    "bos": bos,
    "context": context,
    "tokenizer": tokenizer,
    "dtype": dtype,
    "device": device,
    "chance": chance,
    "fingerprint": fingerprint,
    "kernels": kernels,
    "kv_cache": kv_cache,
    "extraction": extraction,
    "truncation": truncation,
    "size": size,
}
"""Every rule by its id, in the order of the decision."""
