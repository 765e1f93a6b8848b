"""What an evaluation measured, sample by sample, and with which engine."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field

from fp8pipe.records.base import Record
from fp8pipe.records.modules import ModuleProof


def mean_of_samples(metric: str, values: Sequence[float], weights: Sequence[float] = ()) -> float:
    """lm-eval's aggregate of these samples: their (weighted) mean, or perplexity or bits per byte if they are
    log-likelihoods."""
    mean = (
        math.fsum(map(operator.mul, values, weights)) / math.fsum(weights)
        if weights
        else math.fsum(values) / len(values)
    )
    if metric.endswith("perplexity"):
        return math.exp(-mean)
    return -mean / math.log(2) if metric == "bits_per_byte" else mean


class MetricSamples(Record):
    """One metric under one filter, sample by sample, in the order of the task's doc_ids."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # a NaN must reach the gate, which vetoes it

    metric: str
    """lm-eval's name without filter: acc, exact_match, ..."""
    filter: str
    higher_is_better: bool
    mean: float
    stderr: float | None
    """lm-eval's standard error of the mean."""
    values: tuple[float, ...]
    weights: tuple[float, ...] = ()
    """Per sample: the words or bytes that its log-likelihood covers. Empty where all samples weigh the same."""
    extraction_failed: tuple[bool, ...] = ()
    """Per sample: whether the filter found no answer in the text. Empty for metrics without extraction."""


class TaskResult(Record):
    """The result of one lm-eval task; tuples have one entry per scored document."""

    task: str
    version: str
    num_fewshot: int
    doc_ids: tuple[int, ...]
    available: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """How many documents the task has, scored or not; None if unknown."""
    doc_hashes: tuple[str, ...]
    prompt_hashes: tuple[str, ...]
    target_hashes: tuple[str, ...]
    clusters: tuple[str, ...] = ()
    """The cluster of each document (sub-task, source document). Empty where documents are independent."""
    truncated: tuple[bool, ...] = ()
    """Per sample: whether the generation reached its length limit. Empty for loglikelihood tasks."""
    unrecorded: tuple[str, ...] = ()
    """What was not recorded although the task may have it: `truncated generations`, ..."""
    metrics: tuple[MetricSamples, ...]

    def samples_of(self, metric: str, filter: str) -> MetricSamples | None:
        """The entry for this metric and filter; None if there is not exactly one."""
        found = [m for m in self.metrics if m.metric == metric and m.filter == filter]
        return found[0] if len(found) == 1 else None


class EngineFacts(Record):
    """What vLLM resolved and chose, read from the running engine."""

    linear_kernels: tuple[str, ...]
    """Kernels that serve the quantized Linears; empty for an unquantized model."""
    attention_backend: str
    kv_cache_dtype: str
    quantization: str | None
    dtype: str
    max_model_len: int
    arguments: dict[str, Any]
    """Engine arguments as passed, with fp8pipe's defaults and without paths."""
    device_class: str
    """hopper | ada | blackwell | ... | cpu, as the device reports it."""
    device_name: str
    gpus: tuple[str, ...] = ()
    """UUIDs of the GPUs that served; () on a CPU."""
    plugin: str | None
    """The platform plugin that supplied kernels (reference kernels on a CPU); None on stock vLLM."""
    model_bytes: int | None = None
    """Bytes of weights and scales in the memory of all workers."""


class SampleText(Record):
    """The model's greedy continuation of one of the suite's fixed prompts, before it was measured."""

    prompt: str
    text: str
    tokens: int
    finding: Literal["empty", "repeating"] | None
    """empty: only white space. repeating: ends in one short passage over and over."""


class FlipRate(Record):
    """The engine's own noise: how one metric of one task changed when the same model was scored in other batches."""

    task: str
    metric: str
    filter: str
    n: int
    flipped: int
    """Samples whose value differs between the two runs."""
    suite: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """The suite with which it was measured before, on the same model and engine; None: in this measurement."""

    @property
    def rate(self) -> float:
        """Share of samples that differ."""
        return self.flipped / self.n


class ServingFigures(Record):
    """Timings of a fixed workload, taken with vLLM's benchmark code."""

    workload: dict[str, int]
    """num_prompts, input_len, output_len (tokens), max_concurrency, seed."""
    request_throughput: float
    """Requests per second."""
    output_throughput: float
    """Generated tokens per second."""
    total_token_throughput: float
    """Prompt and generated tokens per second."""
    mean_ttft_ms: float
    """Time to the first token."""
    median_ttft_ms: float
    p99_ttft_ms: float
    mean_itl_ms: float
    """Time between two tokens of one answer."""
    median_itl_ms: float
    p99_itl_ms: float
    comparable: bool
    """Whether the figures describe real serving. False on a CPU, where reference kernels serve FP8."""


class Retry(Record):
    """The engine ran out of memory and was started again with smaller settings."""

    cause: str
    """The line of its log that reports it."""
    changed: dict[str, int | float]
    """Engine arguments that replaced the requested ones."""


class EvalReport(Record):
    """One measurement of one model. `baselines/<key>/report.json`, `evaluation/report.json`."""

    role: Literal["baseline", "candidate"]
    model_id: str
    fingerprint: str
    """Fingerprint of the checkpoint; for a baseline, the source commit."""
    suite: str
    suite_digest: str
    engine: EngineFacts
    tasks: tuple[TaskResult, ...]
    add_bos_token: bool | None
    """None if it was not recorded."""
    chat_template_hash: str | None
    """sha256 hex of the chat template that was applied; None without one."""
    tokenizer_hash: str
    """sha256 hex of vocabulary, merges and special tokens as loaded."""
    seeds: dict[str, int]
    versions: dict[str, str]
    """vllm, lm_eval, transformers, torch, fp8pipe."""
    machine: dict[str, str] = Field(default={}, exclude_if=lambda value: not value)
    """Where it ran: python, system, cpu, cuda, driver, ...; empty if another program measured."""
    table: str
    """lm-eval's own result table."""
    folder_identity: str | None = None
    """Digest of the checkpoint's content when it was measured; None for a baseline."""
    proof: ModuleProof | None = None
    """What each layer answered to its seeded input; None in a report of another program, or of an earlier version."""
    samples: tuple[SampleText, ...] = ()
    """The sample generation. Card and reports show what is odd about it."""
    flips: tuple[FlipRate, ...] = ()
    """A baseline compared with itself, for tasks with `repeat` in the suite."""
    serving: ServingFigures | None = None
    retries: tuple[Retry, ...] = ()
    """What it took to fit into memory; empty if the engine ran as requested."""
    seconds: dict[str, float]
    """start (of the process, until the engine is ready), evaluate, total. For people; not part of any identity."""

    def task(self, name: str) -> TaskResult | None:
        """The result of this task; None if there is not exactly one."""
        found = [t for t in self.tasks if t.task == name]
        return found[0] if len(found) == 1 else None
