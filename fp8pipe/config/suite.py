"""A suite: what to measure, and how."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import file_digest
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from fp8pipe.config.base import Config
from fp8pipe.config.files import find, load
from fp8pipe.config.parallel import Parallelism, refuse_raw
from fp8pipe.files import digest_of


class TaskSpec(Config):
    """One lm-eval task of a suite."""

    num_fewshot: int = Field(default=0, ge=0)
    samples: int | None = Field(default=None, ge=1)
    """How many documents to score, from the start of the suite's seeded permutation; None: all."""
    documents: int | None = Field(default=None, ge=1)
    """How many documents the task has, so that a plan needs no data. Data with another count are refused."""
    subtasks: int | None = Field(default=None, ge=2)
    """How many sub-tasks a group has; goes with `documents`. Data with another count are refused."""
    repeat: bool = False
    """Score the baseline twice, in different batches, to measure how many answers the engine flips by itself."""

    @property
    def scored(self) -> int | None:
        """How many documents are scored; None where the suite does not say."""
        return self.documents if self.samples is None else self.samples

    @model_validator(mode="after")
    def _counts_fit(self) -> TaskSpec:
        if self.documents is not None and self.samples is not None and self.samples > self.documents:
            raise ValueError(f"samples: {self.samples} of {self.documents} documents; ask for no more than there are")
        if self.subtasks is not None and self.documents is None:
            raise ValueError("subtasks goes with documents: name both, or neither")
        return self


class ServingWorkload(Config):
    """The requests that the engine is timed on: random prompts of one length, answers of one length."""

    num_prompts: int = Field(default=64, ge=1)
    input_len: int = Field(default=1024, ge=1)
    """Tokens of a prompt."""
    output_len: int = Field(default=128, ge=2)
    """Tokens of an answer, which the end-of-sequence token does not cut short."""
    max_concurrency: int = Field(default=16, ge=1)
    """Most requests in the engine at once."""


SAMPLE_PROMPTS = (
    "The capital of France is",
    "Water freezes at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Question: What is 12 times 7?\nAnswer:",
    "List three reasons why people plant trees:",
)
"""Prompts that both models continue before they are measured."""


class _TaskFile(yaml.SafeLoader):
    """Reads lm-eval's task files and skips their own YAML tags, such as `!function`."""


_TaskFile.add_multi_constructor("!", lambda loader, tag, node: None)


def _local_data(task_file: Path) -> Iterator[Path]:
    """The local files that a task names under `dataset_kwargs: {data_files: ...}`."""
    try:
        task = yaml.load(task_file.read_text(), _TaskFile)
    except (yaml.YAMLError, ValueError):
        return  # lm-eval will report what is wrong with it
    settings = task.get("dataset_kwargs") if isinstance(task, dict) else None
    named = settings.get("data_files") if isinstance(settings, dict) else None
    for files in named.values() if isinstance(named, dict) else [named]:
        for file in files if isinstance(files, list) else [files]:
            if isinstance(file, str) and Path(file).is_file():
                yield Path(file)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


class EvalSuite(Config):
    """What to measure, and how; the same for baseline and candidate."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    task_dir: str | None = None
    """Folder with lm-eval task files of your own, relative to the suite's file."""
    engine: dict[str, Any] = Field(default={})
    """vLLM engine arguments for both sides: max_model_len, dtype, ..."""
    parallel: Parallelism = "auto"
    """How both sides are spread over devices. Not part of the digest: what becomes of `auto` is part of a request."""
    generation: dict[str, Any] = Field(default={})
    """Overrides of the tasks' generation_kwargs."""
    apply_chat_template: bool = False
    add_bos_token: bool = True
    sample_prompts: tuple[str, ...] = SAMPLE_PROMPTS
    """Prompts that the model continues greedily before the tasks. Empty or repetitive text is reported."""
    serving: ServingWorkload | None = None
    """Workload that is timed after the tasks with vLLM's benchmark code; None: nothing is timed."""
    seed: int = 1234

    def digest(self) -> str:
        """sha256 hex of what is measured. The contents of `task_dir` and of local data count; paths, descriptions and
        document counts do not."""
        counts = {"__all__": {"documents", "subtasks"}}  # checks on the data, not part of the measurement
        apart = {"description": True, "task_dir": True, "parallel": True}
        content = self.model_dump(mode="json", exclude=apart | {"tasks": counts})
        if self.task_dir is not None:
            root = Path(self.task_dir)
            files = sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
            content["task_files"] = {str(p.relative_to(root)): _sha256_of(p) for p in files}
            data = sorted({path for file in files if file.suffix == ".yaml" for path in _local_data(file)})
            if data:
                content["data_files"] = [_sha256_of(path) for path in data]
        return digest_of(content)

    @field_validator("engine")
    @classmethod
    def _engine_leaves_the_model_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        owned = {"model", "pretrained", "tokenizer", "quantization", "kv_cache_dtype", "revision"} & set(value)
        if owned:
            raise ValueError(f"{', '.join(sorted(owned))}: fp8pipe sets these itself; remove them from the suite")
        refuse_raw(value)
        return value


def load_suite(name: str) -> EvalSuite:
    """A shipped suite by name, or a suite file by path, with an absolute `task_dir`."""
    path = find("suites", name)
    suite = load(EvalSuite, "suites", name)
    if suite.task_dir is None:
        return suite
    return suite.model_copy(update={"task_dir": str((path.parent / suite.task_dir).resolve())})
