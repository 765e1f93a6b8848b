"""Commands that serve the release and repeat its measurement, quoted for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import groupby

from fp8pipe.release.card.facts import CardFacts


def shell(*words: str) -> str:
    """A command line that a shell reads back as `words`."""
    return " ".join(shlex.quote(" ".join(word.split())) for word in words)


def serve_command(facts: CardFacts) -> str:
    """How to serve the release as it was measured."""
    return shell(
        "vllm", "serve", facts.repo_id, "--revision", facts.checkpoint.release_tag, *_trust(facts), *_cache(facts)
    )


def _cache(facts: CardFacts) -> tuple[str, ...]:
    return ("--kv-cache-dtype", "fp8") if facts.fp8_cache else ()


def _trust(facts: CardFacts) -> tuple[str, ...]:
    return ("--trust-remote-code",) if facts.candidate.engine.arguments.get("trust_remote_code") else ()


def fp8pipe_commands(facts: CardFacts) -> Iterator[str]:
    """From the source to the verdict."""
    source = facts.source.model_id if facts.source.is_local else f"{facts.source.model_id}@{facts.source.commit}"
    recipe, suite, policy = facts.recipe.name, facts.candidate.suite, facts.decision.policy
    yield shell("fp8pipe", "quantize", source, "--recipe", recipe, "--output", "checkpoint", *_trust(facts))
    yield shell("fp8pipe", "validate", "checkpoint", "--source", source)
    yield shell("fp8pipe", "evaluate", source, "--suite", suite, "--output", "baseline", *_trust(facts))
    yield shell(
        "fp8pipe", "evaluate", "checkpoint", "--suite", suite, "--output", "candidate", *_trust(facts), *_cache(facts)
    )
    yield shell("fp8pipe", "gate", "baseline", "candidate", "--policy", policy, "--checkpoint", "checkpoint")


def lm_eval_commands(facts: CardFacts) -> Iterator[str]:
    """The measurement with lm-eval alone: one command per number of shots, which lm-eval applies to all its tasks."""
    report = facts.candidate
    on_cpu = report.engine.device_class == "cpu"
    program = ("python", "-m", "fp8pipe.evaluate.lm_eval") if on_cpu else ("lm_eval",)
    template = ("--apply_chat_template",) if report.chat_template_hash else ()
    gated = {task.task for task in facts.decision.tasks}
    tasks = sorted(
        (task for task in report.tasks if task.task in gated), key=lambda task: (task.num_fewshot, task.task)
    )
    for shots, group in groupby(tasks, key=lambda task: task.num_fewshot):
        names = ",".join(task.task for task in group)
        chosen = ("--tasks", names, "--num_fewshot", str(shots), "--batch_size", "auto")
        yield shell(*program, "run", "--model", "vllm", "--model_args", _model_args(facts), *chosen, *template)


def _model_args(facts: CardFacts) -> str:
    report = facts.candidate
    tag = facts.checkpoint.release_tag
    known = {"pretrained": facts.repo_id, "revision": tag, "add_bos_token": report.add_bos_token}
    simple = {k: v for k, v in sorted(report.engine.arguments.items()) if isinstance(v, str | int | float)}
    owned = {"model", "tokenizer", "kv_cache_dtype", *known, *(_cpu_defaults() if report.engine.plugin else ())}
    cache = {"kv_cache_dtype": report.engine.kv_cache_dtype} if report.engine.kv_cache_dtype != "auto" else {}
    kept = {key: value for key, value in simple.items() if key not in owned}
    return ",".join(f"{key}={value}" for key, value in (known | kept | cache).items())


def _cpu_defaults() -> tuple[str, ...]:
    """Arguments that `python -m fp8pipe.evaluate.lm_eval` sets by itself."""
    from fp8pipe.evaluate.environment import CPU_ENGINE_ARGUMENTS

    return tuple(CPU_ENGINE_ARGUMENTS)
