"""The records that travel between the rooms: frozen, JSON, written last, so that presence means complete.

A record lies beside what it describes (`DIR/fp8pipe/plan.json`, `baselines/<key>/report.json`, ...). What it says is
what was done, not what was asked. Plan and Calibration are drawn in their own rooms (`plan.py`, `calibrate.py`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import operator
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp8pipe.errors import DiskTooSmall, EnvironmentFault, InputError

RECORD_DIR = "fp8pipe"
"""Folder inside a checkpoint that holds its records."""


class Record(BaseModel):
    """Base of all records: frozen, strict about unknown keys, saved atomically."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path) -> Path:
        """Write as JSON under a temporary name, fsync, rename: a reader sees all of it or none."""
        write_atomically(path, self.model_dump_json(indent=1).encode() + b"\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read back; a file that is not this record raises InputError naming the path."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{path}: no such record; run the stage that writes it") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: not a {cls.__name__} record: {where}: {first['msg']}") from error

    @classmethod
    def load_if_present(cls, path: Path) -> Self | None:
        """The record, or None when it was never finished (or was written by an incompatible version)."""
        try:
            return cls.load(path)
        except InputError:
            return None

    def digest(self) -> str:
        """sha256 of the canonical JSON: equal content, equal digest."""
        return digest_of(self.model_dump(mode="json"))


def digest_of(value: Any) -> str:
    """sha256 hex of a JSON value with sorted keys and no spaces; what JSON cannot hold is refused loudly."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def disk_errors(path: Path, what: str = "") -> Iterator[None]:
    """An OSError of writing `path` becomes DiskTooSmall or EnvironmentFault; `what` names the tensor, where it is
    one."""
    try:
        yield
    except OSError as error:
        where = f"{path}: {what}" if what else f"{path}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskTooSmall(
                f"{where}: the disk is full; free some space and run again, what is finished is kept"
            ) from error
        raise EnvironmentFault(f"{where}: cannot write: {error.strerror or error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Temporary name in the same folder, fsync, rename, fsync of the folder. DiskTooSmall or EnvironmentFault when the
    disk does not let it."""
    with disk_errors(path):
        _write_atomically(path, data)


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes files that only their owner may read
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ---------------------------------------------------------------------------------------------- source


class SourceFile(Record):
    """One file of a model repository or folder."""

    name: str
    """Path inside the repository, with `/`."""
    size: int
    """Bytes."""
    oid: str | None = None
    """The Hub's object id: sha256 for LFS files, git blob sha1 for others; None in a local folder."""


class Snapshot(Record):
    """A model pinned to one state."""

    model_id: str
    """The name it is known by: Hub id, or the folder's own name."""
    commit: str
    """Hub commit sha; for a folder `local-` + digest of its config, tokenizer and headers with sizes and times."""
    files: tuple[SourceFile, ...]
    root: str | None = None
    """Folder that holds the files; None while they are only on the Hub. Not identity."""

    @property
    def is_local(self) -> bool:
        """Whether the model was given as a folder."""
        return self.commit.startswith("local-")

    @property
    def path(self) -> Path:
        """The local folder; asserting that the snapshot has been downloaded."""
        assert self.root is not None, f"{self.model_id}@{self.commit} is not downloaded"
        return Path(self.root)


# ---------------------------------------------------------------------------------------------- checkpoint


class Checkpoint(Record):
    """What the quantize stage made. `DIR/fp8pipe/checkpoint.json`."""

    fingerprint: str
    """Source commit + canonical recipe + engine version + calibration digest: two equal fingerprints, equal bytes."""
    model_id: str
    source_commit: str
    recipe: str
    recipe_digest: str
    engine_version: int
    calibration_digest: str | None
    source_bytes: int
    """Bytes of the source's safetensors files."""
    output_bytes: int
    """Bytes of the checkpoint's safetensors files."""
    quantized_tensors: int
    kept_tensors: int
    zero_units: tuple[str, ...] = ()
    """Scale units (`tensor` or `tensor[index]`) whose weights are all zero."""
    seconds: float
    """Plan to fsynced files, resumed work not counted. A figure for people, not identity."""

    @property
    def release_tag(self) -> str:
        """The tag that its release gets on the Hub, unless another is asked for."""
        return f"fp8pipe-{self.fingerprint[:12]}"


class FileHash(Record):
    """Content of one published file."""

    name: str
    size: int
    sha256: str


class Manifest(Record):
    """Content hashes of a finished folder, computed once. `DIR/fp8pipe/manifest.json`."""

    fingerprint: str
    identity: str
    """Digest of config and safetensors headers with sizes and times, as the folder was when it was hashed."""
    files: tuple[FileHash, ...]


# ---------------------------------------------------------------------------------------------- validate

Severity = Literal["error", "warning"]


class Finding(Record):
    """One thing that is wrong, with what to do about it."""

    check: str
    """Id of the check, as in docs: F1, C2, K3, ..."""
    severity: Severity
    file: str | None = None
    tensor: str | None = None
    expected: str
    found: str
    consequence: str = ""
    """What vLLM would do with it."""
    remedy: str

    def sentence(self) -> str:
        """`K2 error model.layers.0...: expected ..., found ...; remedy`."""
        where = ":".join(part for part in (self.file, self.tensor) if part)
        return f"{self.check} {self.severity} {where}: expected {self.expected}, found {self.found}; {self.remedy}"


class ValidationReport(Record):
    """All findings of one validation. No error means sound. `DIR/fp8pipe/validation.json`."""

    folder_identity: str
    depth: Literal["headers", "values", "fidelity"]
    known_from: Literal["architecture", "names"] = "names"
    """What told Linears from the rest: the architecture record, or names and shapes alone."""
    checks: tuple[str, ...]
    """Ids of the checks that ran."""
    findings: tuple[Finding, ...]
    tensors: int
    bytes_read: int

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity == "warning")

    @property
    def sound(self) -> bool:
        """True when no finding is an error."""
        return not self.errors


# ---------------------------------------------------------------------------------------------- evaluate


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


# ---------------------------------------------------------------------------------------------- gate

Verdict = Literal["accepted", "rejected", "inconclusive"]


class RuleOutcome(Record):
    """One rule of the gate, one line of reason."""

    rule: str
    """samples | versions | templates | seeds | shots | bos | context | tokenizer | chance | metrics | ..."""
    outcome: Literal["passed", "vetoed", "unchecked"]
    reason: str


class TaskDecision(Record):
    """The paired test of one metric of a task; drop = baseline - candidate, in the metric's own unit.

    0.02 is two points of an accuracy. Where lower is better the drop is candidate - baseline: a drop is always a loss.
    """

    task: str
    metric: str
    filter: str
    verdict: Verdict
    reason: str
    n: int
    baseline: float
    candidate: float
    drop: float
    drop_lower: float
    """One-sided lower bound at the alpha used for rejection."""
    drop_upper: float
    """One-sided upper bound at the alpha used for acceptance."""
    margin: float
    method: str
    """score-paired | bootstrap-paired | cluster-bootstrap | ..."""
    p_accept: float
    """p value of H0: drop >= margin."""
    p_reject: float
    """p value of H0: drop <= margin, before Holm."""
    discordant_lost: int | None = None
    """0/1 metrics: samples right in the baseline, wrong in the candidate."""
    discordant_won: int | None = None
    mcnemar_p: float | None = None
    """One-sided exact McNemar; reported, decides nothing."""
    recovery: float | None = None
    """candidate / baseline; reported, decides nothing."""


def metric_label(task: TaskDecision, among: Sequence[TaskDecision]) -> str:
    """The task's name, with metric and filter where several of it were decided."""
    alone = sum(other.task == task.task for other in among) == 1
    return task.task if alone else f"{task.task} {task.metric},{task.filter}"


class EarlierAttempt(Record):
    """A recipe of the ladder that the gate rejected before this one was tried."""

    recipe: str
    fingerprint: str
    reason: str


class GateDecision(Record):
    """The verdict with every number it compared. `DIR/fp8pipe/gate.json`."""

    verdict: Verdict
    vetoed: tuple[str, ...]
    unchecked: tuple[str, ...]
    rules: tuple[RuleOutcome, ...]
    tasks: tuple[TaskDecision, ...]
    policy: str
    policy_digest: str
    suite: str
    alpha: float
    alpha_spent: float
    """alpha of this look of this attempt, after the split over looks and attempts."""
    attempt: int
    max_attempts: int
    look: int
    looks: int
    earlier: tuple[EarlierAttempt, ...] = ()
    """The way down the ladder to this attempt."""
    baseline_fingerprint: str
    candidate_fingerprint: str
    baseline_report: str
    """Digest of the baseline's EvalReport."""
    candidate_report: str
    device_class: str
    reason: str
    """The verdict in one sentence."""

    @property
    def final(self) -> bool:
        """Whether nothing more is to be measured: settled, or after the last look."""
        return self.verdict != "inconclusive" or self.look == self.looks


# ---------------------------------------------------------------------------------------------- publish


class Approval(Record):
    """A person's decision to publish what the gate found inconclusive. `DIR/fp8pipe/approval.json`."""

    who: str
    when: str
    """ISO 8601, UTC."""
    reason: str
    decision: str
    """Digest of the GateDecision that was approved: another decision needs another approval."""


class Release(Record):
    """A checkpoint on the Hub, proven by re-reading it. `release.json`."""

    model_id: str
    source_commit: str
    recipe: str
    fingerprint: str
    verdict: Verdict
    endpoint: str
    repo_id: str
    repo_url: str
    commit: str
    tag: str
    collection_slug: str | None
    collection_url: str | None
    collection_note: str | None
    files: tuple[FileHash, ...]
    """What the Hub was asked to hold, each verified against the Hub's own checksums."""
    new_commit: bool
    """False when the Hub already held these bytes."""


class Outcome(Record):
    """How one release ended, whichever way. `releases/.../release.json`."""

    verdict: Verdict | Literal["unsound"]
    """unsound: the validator found errors, so nothing was evaluated."""
    reason: str
    model_id: str
    source_commit: str
    recipe: str
    suite: str
    policy: str
    fingerprint: str
    source_bytes: int
    output_bytes: int
    decision: GateDecision | None
    release: Release | None
    """None unless it was published."""

    @property
    def ending(self) -> str:
        """released, whoever decided it; else the verdict."""
        return "released" if self.release is not None else self.verdict

    def kept(self, path: Path) -> Self:
        """Itself, once it is saved."""
        self.save(path)
        return self

    @property
    def exit_code(self) -> int:
        """How it ends a command: released by decision is done, too."""
        return 0 if self.release is not None else VERDICT_EXIT_CODES[self.verdict]

    @property
    def falls_back(self) -> bool:
        """Whether the numbers rejected it, so that the next recipe may be tried. A veto never starts the ladder."""
        return self.verdict == "rejected" and self.decision is not None and not self.decision.vetoed


VERDICT_EXIT_CODES = {"accepted": 0, "rejected": 1, "unsound": 1, "inconclusive": 3}
"""How a decided release ends a command."""


class BatchEntry(Record):
    """One release of a batch: its outcome, or the error that ended it."""

    model: str
    recipe: str
    repo_id: str
    exit_code: int
    outcome: Outcome | None
    error: str | None


class BatchResult(Record):
    """How every release of a collection ended."""

    collection: str
    entries: tuple[BatchEntry, ...]
