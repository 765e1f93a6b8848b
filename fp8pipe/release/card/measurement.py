"""How both sides were measured: the engine, its noise, its speed and memory."""

from __future__ import annotations

from collections.abc import Iterator

from fp8pipe.config import Parallel
from fp8pipe.records import EvalReport
from fp8pipe.release.card.facts import CardFacts

_LIMIT_RULES = {"min_speedup": "speed", "max_memory_ratio": "memory"}
"""A policy's limits on serving -> the gate's rules that check them."""


def engine_rows(report: EvalReport) -> list[tuple[str, str]]:
    """The engine that measured, and how it was set up."""
    engine = report.engine
    rows = [
        ("vLLM", report.versions.get("vllm", "not recorded")),
        ("device", f"{engine.device_class} ({engine.device_name})"),
        ("parallelism", str(Parallel.of(engine.arguments))),
        ("Linear kernels", ", ".join(engine.linear_kernels) or "not recorded"),
        ("attention", engine.attention_backend),
        ("KV cache dtype", engine.kv_cache_dtype),
        ("unquantized dtype", engine.dtype),
        ("context", f"up to {engine.max_model_len:,} tokens"),
        ("chat template", "applied" if report.chat_template_hash else "not applied"),
        ("beginning-of-sequence token", "added" if report.add_bos_token else "not added"),
    ]
    rows.append(("seeds", _seeds(report)))
    rows += [(name, report.versions[name]) for name in ("lm_eval", "transformers", "torch") if name in report.versions]
    return rows


def _seeds(report: EvalReport) -> str:
    """One number if they are all the same."""
    names = ", ".join(report.seeds)
    if len(set(report.seeds.values())) == 1:
        return f"{next(iter(report.seeds.values()))} ({names})"
    return ", ".join(f"{name} {seed}" for name, seed in report.seeds.items()) or "not recorded"


def noise_lines(baseline: EvalReport) -> Iterator[str]:
    """How often the baseline's answers change when it is run twice, metric by metric."""
    for flip in baseline.flips:
        share = f"{flip.flipped:,} of {flip.n:,} ({100 * flip.rate:.2f} %)"
        where = f", measured with suite {flip.suite}" if flip.suite else ""
        yield f"{flip.task}, {flip.metric} ({flip.filter}): {share}{where}"


def serving_rows(facts: CardFacts) -> list[dict[str, str]]:
    """Speed and memory of both sides; empty unless both were timed on the same workload."""
    sides = (facts.baseline, facts.candidate)
    one, other = (side.serving for side in sides)
    if one is None or other is None or one.workload != other.workload:
        return []
    rows = [
        ("requests per second", one.request_throughput, other.request_throughput),
        ("generated tokens per second", one.output_throughput, other.output_throughput),
        ("prompt and generated tokens per second", one.total_token_throughput, other.total_token_throughput),
        ("time to first token, median, ms", one.median_ttft_ms, other.median_ttft_ms),
        ("time to first token, 99 %, ms", one.p99_ttft_ms, other.p99_ttft_ms),
        ("between tokens, median, ms", one.median_itl_ms, other.median_itl_ms),
        ("between tokens, 99 %, ms", one.p99_itl_ms, other.p99_itl_ms),
    ]
    memory = [side.engine.model_bytes for side in sides]
    if memory[0] and memory[1]:
        rows.append(("weights in memory, MB", memory[0] / 1e6, memory[1] / 1e6))
    return [
        {"": name, "BF16": f"{before:,.1f}", "FP8": f"{after:,.1f}", "ratio": f"{after / before:.2f}"}
        for name, before, after in rows
    ]


def serving_note(facts: CardFacts) -> str:
    """What was timed; empty if nothing was."""
    figures = facts.candidate.serving
    if figures is None:
        return ""
    workload = figures.workload
    what = (
        f"vLLM's benchmark: {workload['num_prompts']} random prompts of {workload['input_len']} tokens, "
        f"{workload['output_len']} tokens generated for each, {workload['max_concurrency']} at a time."
    )
    return (
        what
        if figures.comparable
        else f"{what} Timed on a CPU: the figures say nothing about a GPU, nor about FP8 against BF16."
    )


def serving_limits(facts: CardFacts) -> list[str]:
    """What the gate ruled on the policy's limits on speed and memory."""
    rules = {rule.rule: rule for rule in facts.decision.rules}
    limited = facts.policy.serving_limits if facts.policy is not None else ()
    found = [rules[_LIMIT_RULES[name]] for name in limited if _LIMIT_RULES[name] in rules]
    return [f"The gate's limit on {rule.rule}: {rule.outcome}, {rule.reason}." for rule in found]
