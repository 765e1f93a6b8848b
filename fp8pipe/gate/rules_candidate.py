"""Rules about the candidate: it is the checkpoint, served as its recipe means it to be, and still answers."""

from __future__ import annotations

from collections.abc import Sequence

from fp8pipe.gate.evidence import Evidence, Outcome, passed, settled, unchecked, vetoed

_Flags = tuple[str, int, tuple[bool, ...], tuple[bool, ...]]
"""Name, documents, one flag per sample of the baseline, of the candidate."""

MIN_RISE = 0.01
"""Rise in the share of failed extractions or truncations, above which it may veto: one point."""

_WEIGHT_ONLY = ("marlin", "humming", "a16", "cpufp8blockscaledmmkernel", "cpufp8pertensorscaledmmlinearkernel")
"""Parts of the names, in lower case, of vLLM's kernels that keep FP8 weights but multiply in 16 bits."""


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
    return settled(problems, f"the candidate is checkpoint {checkpoint.fingerprint[:16]}, the baseline its source")


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
    found = []
    for name, wanted, ours, theirs in evidence.gated_pairs():
        sides = (side.samples_of(wanted.metric, wanted.filter) for side in (ours, theirs))
        before, after = (metric.extraction_failed if metric is not None else () for metric in sides)
        found.append((evidence.policy.label(name, wanted), len(ours.doc_ids), before, after))
    return _rise(evidence, "failed extractions", found)


def truncation(evidence: Evidence) -> Outcome:
    """The candidate does not run into the length limit much more often."""
    found = [(name, len(ours.doc_ids), ours.truncated, theirs.truncated) for name, ours, theirs in evidence.pairs()]
    return _rise(evidence, "truncated generations", found)


def _rise(evidence: Evidence, what: str, found: Sequence[_Flags]) -> Outcome:
    from fp8pipe.gate.statistics import mcnemar_p  # scipy takes a second to import

    problems, seen = [], []
    unknown = [name for name, *sides in evidence.pairs() for side in sides if what in side.unrecorded]
    for name, documents, before, after in found:
        if len(before) != len(after) or len(before) not in (0, documents):
            problems.append(f"{name}: {what} recorded for {len(before)} and {len(after)} of {documents} samples")
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
    if unknown and not problems:
        return unchecked(f"{what} are not recorded for {', '.join(dict.fromkeys(unknown))}")
    return settled(problems, f"{what}: {', '.join(seen)}" if seen else f"no gated task can have {what}")


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
