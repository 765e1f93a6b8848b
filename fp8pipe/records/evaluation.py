"""What an evaluation measured, sample by sample, and how the engine was set up."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field

from fp8pipe.records.base import Record


def mean_of_samples(metric: str, values: Sequence[float], weights: Sequence[float] = ()) -> float:
    """What lm-eval reports of these samples: their mean, weighted where they have weights; of log-likelihoods the
    perplexity, or bits."""
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
    """Per sample: words or bytes that its log-likelihood is spread over; empty where every sample counts the same."""
    extraction_failed: tuple[bool, ...] = ()
    """Per sample: the filter found no answer in the text. Empty for metrics without extraction."""


class TaskResult(Record):
    """One lm-eval task, one entry per document in each tuple."""

    task: str
    version: str
    num_fewshot: int
    doc_ids: tuple[int, ...]
    available: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """Documents that the task has, scored or not; None where the source of this result did not tell."""
    doc_hashes: tuple[str, ...]
    prompt_hashes: tuple[str, ...]
    target_hashes: tuple[str, ...]
    clusters: tuple[str, ...] = ()
    """Cluster of each document (subtask, source document); empty when documents are independent."""
    truncated: tuple[bool, ...] = ()
    """Per sample: the generation hit its length limit. Empty for loglikelihood tasks."""
    unrecorded: tuple[str, ...] = ()
    """What the source of this result did not tell, though the task can have it: `truncated generations`, ..."""
    metrics: tuple[MetricSamples, ...]

    def samples_of(self, metric: str, filter: str) -> MetricSamples | None:
        """The one entry for this metric and filter, None when there is none."""
        found = [m for m in self.metrics if m.metric == metric and m.filter == filter]
        return found[0] if len(found) == 1 else None


class EngineFacts(Record):
    """What vLLM resolved and chose, read back from the engine."""

    linear_kernels: tuple[str, ...]
    """Names of the kernels that serve the quantized Linears; empty for an unquantized model."""
    attention_backend: str
    kv_cache_dtype: str
    quantization: str | None
    dtype: str
    max_model_len: int
    arguments: dict[str, Any]
    """Engine arguments as passed, after defaults of fp8pipe; paths excluded."""
    device_class: str
    """hopper | ada | blackwell | ... | cpu, from the device itself."""
    device_name: str
    plugin: str | None
    """Name of a platform plugin that supplied kernels (CPU reference kernels); None on stock vLLM."""
    model_bytes: int | None = None
    """Bytes of the weights and scales as they lie in the memory of all workers."""


class SampleText(Record):
    """What the model said to one of the suite's fixed prompts, greedily, before it was measured."""

    prompt: str
    text: str
    tokens: int
    finding: Literal["empty", "repeating"] | None
    """empty: nothing but white space. repeating: the end is one short passage over and over."""


class FlipRate(Record):
    """One metric of one task, scored twice by the same model in other batches: the engine's own noise."""

    task: str
    metric: str
    filter: str
    n: int
    flipped: int
    """Samples whose value differs between the two runs."""

    @property
    def rate(self) -> float:
        """Share of samples that differ."""
        return self.flipped / self.n


class ServingFigures(Record):
    """Timings of a fixed workload, by vLLM's own benchmark code."""

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
    """Whether the figures say something about serving. False on a CPU, where reference kernels serve FP8."""


class Retry(Record):
    """The engine ran out of memory and was started anew with less."""

    cause: str
    """The line of its log that says so."""
    changed: dict[str, int | float]
    """Engine arguments that replaced those asked for."""


class EvalReport(Record):
    """One model measured once. `baselines/<key>/report.json`, `evaluation/report.json`."""

    role: Literal["baseline", "candidate"]
    model_id: str
    fingerprint: str
    """The checkpoint's fingerprint; for a baseline the source commit."""
    suite: str
    suite_digest: str
    engine: EngineFacts
    tasks: tuple[TaskResult, ...]
    add_bos_token: bool | None
    """None where it was not recorded."""
    chat_template_hash: str | None
    """sha256 of the template that was applied; None when none was."""
    tokenizer_hash: str
    """sha256 over the vocabulary, merges and special tokens as loaded."""
    seeds: dict[str, int]
    versions: dict[str, str]
    """vllm, lm_eval, transformers, torch, fp8pipe."""
    table: str
    """lm-eval's own result table."""
    folder_identity: str | None = None
    """Identity of the checkpoint folder as it was measured; None for a baseline."""
    samples: tuple[SampleText, ...] = ()
    """The sample generation; the card and the report show what is odd about it."""
    flips: tuple[FlipRate, ...] = ()
    """A baseline measured against itself, for the tasks whose suite says `repeat`."""
    serving: ServingFigures | None = None
    retries: tuple[Retry, ...] = ()
    """What it took to fit into memory; empty when the engine ran as asked."""
    seconds: dict[str, float]
    """start (process to ready engine), evaluate, total. Figures for people, not identity."""

    def task(self, name: str) -> TaskResult | None:
        """The one result of this task, None when absent or ambiguous."""
        found = [t for t in self.tasks if t.task == name]
        return found[0] if len(found) == 1 else None
