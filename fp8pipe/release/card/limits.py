"""What was checked, and what was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fp8pipe.records import ValidationReport
from fp8pipe.release.card.facts import CardFacts


def validation_line(validation: ValidationReport) -> str:
    """The validation in one line, before its warnings."""
    found = len(validation.warnings)
    return (
        f"{len(validation.checks)} checks over {validation.tensors} tensors, depth {validation.depth}: no error, "
        + ("no warning." if not found else f"{found} warning{'s' if found > 1 else ''}:")
    )


def known_limits(facts: CardFacts) -> Iterator[str]:
    """What the measurement says nothing about, one sentence each."""
    engine = facts.candidate.engine
    if engine.device_class == "cpu":
        yield "Measured on a CPU. Measure it again on the GPU that will serve it before relying on the numbers."
    else:
        yield f"Measured on {engine.device_class} only; kernels differ between device classes."
    if facts.recipe.activations is not None:
        yield "On GPUs below compute capability 8.9, vLLM computes in 16 bits with FP8 weights; this was not measured."
    if facts.asks_for_cache:
        yield "With --kv-cache-dtype bfloat16, the KV cache stays in 16 bits; this was not measured."
    elif facts.recipe.kv_cache is not None:
        yield "Without --kv-cache-dtype fp8, the KV cache keeps the model's dtype; this was not measured."
    names = ", ".join(dict.fromkeys(task.task for task in facts.decision.tasks))
    yield f"Accuracy is known for {names} within {engine.max_model_len:,} tokens of context; nothing else was measured."
    assumed = facts.calibration.assumed if facts.calibration is not None else {}
    for reason, count in Counter(assumed.values()).items():
        first = next(name for name, why in assumed.items() if why == reason)
        yield f"{count} of the scales are not measured ({reason}); the first is {first}."
    for problem in facts.source_card.problems:
        yield f"The source's own card is not clear: {problem}."
    if facts.checkpoint.zero_units:
        count = len(facts.checkpoint.zero_units)
        yield f"All weights behind {count} of the scales are zero; the first is {facts.checkpoint.zero_units[0]}."
    if facts.checkpoint.faint_units:
        count = len(facts.checkpoint.faint_units)
        first = facts.checkpoint.faint_units[0]
        yield f"Weights too small for FP8 became zero, all those behind {count} of the scales; the first is {first}."
