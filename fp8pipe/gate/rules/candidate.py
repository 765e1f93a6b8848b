"""Rules about the candidate: it is the checkpoint on disk, it was served as its recipe intends, it still answers."""

from __future__ import annotations

from collections.abc import Sequence

from fp8pipe.gate.rules.pair import Pair, Ruling, passed, settled, unchecked, vetoed

_Flags = tuple[str, int, tuple[bool, ...], tuple[bool, ...]]
"""Name, number of documents, one flag per sample of the baseline, the same of the candidate."""

MIN_RISE = 0.01
"""The share of failed extractions or truncations may rise by one point before it can be a veto."""

_WEIGHT_ONLY = ("marlin", "humming", "a16", "cpufp8blockscaledmmkernel", "cpufp8pertensorscaledmmlinearkernel")
"""Parts of the lower-case names of vLLM kernels that store FP8 weights but multiply in 16 bits."""


def fingerprint(pair: Pair) -> Ruling:
    """The candidate's report is about the checkpoint on disk, and the baseline's about the model it was made from."""
    checkpoint, baseline, candidate = pair.checkpoint, pair.baseline, pair.candidate
    if checkpoint is None:
        return unchecked("no checkpoint was given, so the candidate's fingerprint could not be compared")
    problems = []
    if (baseline.role, candidate.role) != ("baseline", "candidate"):
        problems.append(f"expected a baseline and a candidate report, found a {baseline.role} and a {candidate.role}")
    if candidate.fingerprint != checkpoint.fingerprint:
        problems.append(
            f"the candidate report is about {candidate.fingerprint}, but the folder is {checkpoint.fingerprint}"
        )
    if baseline.fingerprint != checkpoint.source_commit:
        problems.append(f"the baseline report is about {baseline.fingerprint}, not source {checkpoint.source_commit}")
    if pair.recipe is not None and pair.recipe.name != checkpoint.recipe:
        problems.append(f"the checkpoint was made with recipe {checkpoint.recipe}, not {pair.recipe.name}")
    return settled(
        problems, f"the candidate is checkpoint {checkpoint.fingerprint[:16]}, and the baseline is its source"
    )


def kernels(pair: Pair) -> Ruling:
    """Quantized Linears ran on kernels of the recipe's kind: a verdict on W8A16 says nothing about W8A8."""
    ours, theirs = pair.baseline.engine, pair.candidate.engine
    if ours.quantization is not None:
        return vetoed(f"the baseline was served quantized ({ours.quantization})")
    if theirs.quantization is None:
        if pair.checkpoint is not None:
            return vetoed("the candidate was served without quantization")
        return unchecked("the candidate is not quantized, so no FP8 kernel served it")
    if not theirs.linear_kernels:
        return unchecked("the report does not record the kernels that served the quantized Linears")
    weight_only = pair.recipe is not None and pair.recipe.activations is None
    wrong = [name for name in theirs.linear_kernels if _is_w8a8(name) == weight_only]
    served = ", ".join(theirs.linear_kernels)
    if wrong:
        wanted = "weight-only FP8" if weight_only else "FP8 W8A8"
        return vetoed(f"served by {', '.join(wrong)}, expected {wanted} kernels only")
    return passed(f"served by {served}")


def _is_w8a8(kernel: str) -> bool:
    """Whether the vLLM kernel of this name multiplies FP8 weights by FP8 activations."""
    name = kernel.lower()
    return "fp8" in name and not any(part in name for part in _WEIGHT_ONLY)


def kv_cache(pair: Pair) -> Ruling:
    """The KV cache has the model's own dtype in the baseline, and the recipe's in the candidate."""
    ours, theirs = pair.baseline.engine.kv_cache_dtype, pair.candidate.engine.kv_cache_dtype
    if ours.startswith("fp8"):
        return vetoed(f"the baseline's KV cache is {ours}")
    if pair.recipe is None:
        return unchecked(f"no recipe was given to compare with; the candidate's KV cache is {theirs}")
    wanted = pair.recipe.kv_cache is not None
    if theirs.startswith("fp8") != wanted:
        return vetoed(
            f"recipe {pair.recipe.name} has {'an' if wanted else 'no'} FP8 KV cache, but the candidate had {theirs}"
        )
    return passed(f"KV cache {theirs}, as recipe {pair.recipe.name} wants; baseline {ours}")


def extraction(pair: Pair) -> Ruling:
    """Filters fail to extract an answer from the candidate about as rarely as from the baseline."""
    found = []
    for name, wanted, ours, theirs in pair.metrics():
        sides = (side.samples_of(wanted.metric, wanted.filter) for side in (ours, theirs))
        before, after = (metric.extraction_failed if metric is not None else () for metric in sides)
        found.append((pair.policy.label(name, wanted), len(ours.doc_ids), before, after))
    return _rise(pair, "failed extractions", found)


def truncation(pair: Pair) -> Ruling:
    """The candidate reaches the length limit about as rarely as the baseline."""
    found = [(name, len(ours.doc_ids), ours.truncated, theirs.truncated) for name, ours, theirs in pair.tasks()]
    return _rise(pair, "truncated generations", found)


def _rise(pair: Pair, what: str, found: Sequence[_Flags]) -> Ruling:
    from fp8pipe.gate.statistics import mcnemar_p  # late: importing scipy takes a second

    problems, seen = [], []
    unknown = [name for name, *sides in pair.tasks() for side in sides if what in side.unrecorded]
    for name, documents, before, after in found:
        if len(before) != len(after) or len(before) not in (0, documents):
            problems.append(f"{name}: {what} recorded for {len(before)} and {len(after)} of {documents} samples")
        elif before:
            new = sum(b and not a for a, b in zip(before, after, strict=True))
            gone = sum(a and not b for a, b in zip(before, after, strict=True))
            rise, p = (new - gone) / len(before), mcnemar_p(new, gone)
            seen.append(f"{name} {sum(before)} -> {sum(after)}")
            if p < pair.policy.alpha and rise > MIN_RISE:
                problems.append(
                    f"{name}: {what} rose from {sum(before)} to {sum(after)} of {len(before)} "
                    f"({100 * rise:.1f} points, McNemar p {p:.2g})"
                )
    if unknown and not problems:
        return unchecked(f"{what} are not recorded for {', '.join(dict.fromkeys(unknown))}")
    return settled(problems, f"{what}: {', '.join(seen)}" if seen else f"no gated task can have {what}")


def size(pair: Pair) -> Ruling:
    """The checkpoint is within the policy's size limit."""
    limit, checkpoint = pair.policy.max_size_ratio, pair.checkpoint
    if limit is None:
        return passed(f"policy {pair.policy.name} sets no size limit")
    if checkpoint is None:
        return unchecked("no checkpoint was given, so its size is unknown")
    ratio = checkpoint.output_bytes / checkpoint.source_bytes
    reason = f"{checkpoint.output_bytes} of {checkpoint.source_bytes} bytes, ratio {ratio:.3f}"
    return passed(f"{reason}, limit {limit:g}") if ratio <= limit else vetoed(f"{reason} is above the limit {limit:g}")
