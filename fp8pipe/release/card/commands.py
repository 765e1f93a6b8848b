"""Commands that serve the release and repeat its measurement, quoted for a shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from itertools import groupby

from fp8pipe.config import Parallel
from fp8pipe.records import RECORD_DIR, RECORD_FILES, EvalReport
from fp8pipe.release.card.facts import CardFacts
from fp8pipe.release.card.parsers import reasoning_parser, tool_parser

READ = ("w8a8", "otherwise")
"""Verdicts on an engine that loads the checkpoint."""


WIDTH = 84
"""Letters of a line in a block of code that a laptop's page shows without scrolling."""


def shell(*words: str) -> str:
    """A command that a shell reads back as `words`, continued where a line would be too long."""
    parts: list[str] = []
    for word in (shlex.quote(" ".join(word.split())) for word in words):
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and not word.startswith("--"):
            parts[-1] += f" {word}"  # an option stays with its value
        else:
            parts.append(word)
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < WIDTH:
            lines[-1] += f" {part}"
        else:
            lines.append(f"  {part}")
    return " \\\n".join(lines)


def serve_command(facts: CardFacts) -> str:
    """How to serve the release as it was measured."""
    serve = ("vllm", "serve", facts.repo_id, "--revision", facts.tag)
    return shell(*serve, *_trust(facts), *_cache(facts), *_parallelism(facts), *_parsers(facts))


def _parallelism(facts: CardFacts) -> Iterator[str]:
    """How the measured engine was spread over GPUs, by vLLM's own names."""
    for name, value in Parallel.of(facts.candidate.engine.arguments).arguments.items():
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield str(value)


def _parsers(facts: CardFacts) -> Iterator[str]:
    """What turns the model's reasoning and tool calls into fields of an answer."""
    if (reasoning := reasoning_parser(facts.chat_template)) is not None:
        yield from ("--reasoning-parser", reasoning)
    if (tools := tool_parser(facts.chat_template)) is not None:
        yield from ("--enable-auto-tool-choice", "--tool-call-parser", tools)


def client_code(facts: CardFacts) -> str:
    """A request to that server, with the OpenAI client."""
    asked = 'messages=[{"role": "user", "content": "What is FP8?"}]' if facts.chat_template else 'prompt="FP8 is"'
    api, answer = ("chat.completions", "message.content") if facts.chat_template else ("completions", "text")
    return f"""\
from openai import OpenAI

client = OpenAI(base_url="http://localhost:8000/v1", api_key="-")
answer = client.{api}.create(
    model={json.dumps(facts.repo_id)},
    {asked},
    max_tokens=512,
)
print(answer.choices[0].{answer})"""


def transformers_code(facts: CardFacts) -> str:
    """How transformers loads it; empty where it does not, or nobody knows."""
    serving = facts.validation.serving
    reads = serving is not None and any(a.engine == "transformers" and a.verdict in READ for a in serving.answers)
    if not reads:
        return ""
    architectures = facts.config.get("architectures")
    causal = isinstance(architectures, list) and any(str(name).endswith("ForCausalLM") for name in architectures)
    auto, source = ("AutoModelForCausalLM" if causal else "AutoModelForImageTextToText"), json.dumps(facts.repo_id)
    tag = json.dumps(facts.tag)
    return f"""\
from transformers import {auto}, AutoTokenizer

name, tag = {source}, {tag}
model = {auto}.from_pretrained(name, revision=tag, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(name, revision=tag)"""


def _cache(facts: CardFacts) -> tuple[str, ...]:
    return ("--kv-cache-dtype", "fp8") if facts.fp8_cache else ()


def _trust(facts: CardFacts) -> tuple[str, ...]:
    return ("--trust-remote-code",) if facts.candidate.engine.arguments.get("trust_remote_code") else ()


def fp8pipe_commands(facts: CardFacts) -> Iterator[str]:
    """From the source to the verdict, with the suite and the policy of the release."""
    source = facts.source.model_id if facts.source.is_local else f"{facts.source.model_id}@{facts.source.commit}"
    suite, policy = (f"release/{RECORD_DIR}/{RECORD_FILES[name]}" for name in ("suite", "policy"))
    measured = ("--suite", suite, *_trust(facts))
    spread = Parallel.of(facts.candidate.engine.arguments)
    if spread.devices > 1:
        measured += ("--parallel", spread.spelled)
    records = ("--include", f"{RECORD_DIR}/*", "--local-dir", "release")
    yield shell("hf", "download", facts.repo_id, "--revision", facts.tag, *records)
    yield shell("fp8pipe", "quantize", source, "--recipe", facts.recipe.name, "--output", "checkpoint", *_trust(facts))
    yield shell("fp8pipe", "validate", "checkpoint", "--source", source)
    yield shell("fp8pipe", "evaluate", source, *measured, "--output", "baseline")
    yield shell("fp8pipe", "evaluate", "checkpoint", *measured, "--output", "candidate", *_cache(facts))
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
        engine = ("--model", "vllm", "--model_args", *_model_args(facts))
        yield shell(*program, "run", *engine, *chosen, *template, *_generation(facts), *_seeds(report))


def _generation(facts: CardFacts) -> tuple[str, ...]:
    """What the suite asks of generation in place of the tasks' own."""
    given = facts.suite.generation if facts.suite is not None else {}
    return ("--gen_kwargs", json.dumps(given, sort_keys=True)) if given else ()


def _seeds(report: EvalReport) -> tuple[str, ...]:
    """lm-eval's four, in its order."""
    seeds = [report.seeds.get(name) for name in ("random", "numpy", "torch", "fewshot")]
    if not any(seed is not None for seed in seeds):
        return ()
    return "--seed", str(seeds[0]) if len(set(seeds)) == 1 else ",".join(map(str, seeds))


def _model_args(facts: CardFacts) -> list[str]:
    """The engine as it was measured: one JSON object if an argument is none of text and number, else `key=value`."""
    report = facts.candidate
    known = {"pretrained": facts.repo_id, "revision": facts.tag, "add_bos_token": report.add_bos_token}
    if (seed := report.seeds.get("engine")) is not None:
        known["seed"] = seed
    given = {key: value for key, value in sorted(report.engine.arguments.items()) if value is not None}
    owned = {"model", "tokenizer", "kv_cache_dtype", *known, *(_cpu_defaults() if report.engine.plugin else ())}
    cache = {"kv_cache_dtype": report.engine.kv_cache_dtype} if report.engine.kv_cache_dtype != "auto" else {}
    kept = {key: value for key, value in given.items() if key not in owned}
    arguments = known | kept | cache
    if all(isinstance(value, str | int | float) for value in kept.values()):
        return [f"{key}={value}" for key, value in arguments.items()]
    return [json.dumps(arguments)]


def _cpu_defaults() -> tuple[str, ...]:
    """Arguments that `python -m fp8pipe.evaluate.lm_eval` sets by itself."""
    from fp8pipe.evaluate.environment import CPU_ENGINE_ARGUMENTS

    return tuple(CPU_ENGINE_ARGUMENTS)
