"""A suite: what is measured, and how."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import file_digest
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from fp8pipe.config.base import Config
from fp8pipe.config.files import find, load
from fp8pipe.files import digest_of


class TaskSpec(Config):
    """One lm-eval task of a suite."""

    num_fewshot: int = Field(default=0, ge=0)
    samples: int | None = Field(default=None, ge=1)
    """Documents to score, the first of the suite's seeded permutation; None for all."""
    documents: int | None = Field(default=None, ge=1)
    """Documents that the task has. A plan then needs no data; data that hold another number are refused."""
    subtasks: int | None = Field(default=None, ge=2)
    """Sub-tasks that a group's documents come from, named with `documents`; data with another number are refused."""
    repeat: bool = False
    """Score the baseline a second time, in other batches: the share of answers that flip is the engine's own."""

    @property
    def scored(self) -> int | None:
        """Documents that are scored, where the suite tells."""
        return self.documents if self.samples is None else self.samples

    @model_validator(mode="after")
    def _counts_fit(self) -> TaskSpec:
        if self.documents is not None and self.samples is not None and self.samples > self.documents:
            raise ValueError(f"samples: {self.samples} of {self.documents} documents; ask for no more than there are")
        if self.subtasks is not None and self.documents is None:
            raise ValueError("subtasks goes with documents: name both, or neither")
        return self


class ServingWorkload(Config):
    """What the engine is timed on: random prompts of one length, answers of one length, at most so many at a time."""

    num_prompts: int = Field(default=64, ge=1)
    input_len: int = Field(default=1024, ge=1)
    """Tokens of a prompt."""
    output_len: int = Field(default=128, ge=2)
    """Tokens of an answer; the end-of-sequence token does not end it."""
    max_concurrency: int = Field(default=16, ge=1)
    """Requests in the engine at a time."""


SAMPLE_PROMPTS = (
    "The capital of France is",
    "Water freezes at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Question: What is 12 times 7?\nAnswer:",
    "List three reasons why people plant trees:",
)
"""What both models are asked to go on from, before they are measured."""


class _TaskFile(yaml.SafeLoader):
    """lm-eval's task files have tags of their own (`!function`), of no interest here."""


_TaskFile.add_multi_constructor("!", lambda loader, tag, node: None)


def _local_data(task_file: Path) -> Iterator[Path]:
    """Files of this machine that a task's `dataset_kwargs: {data_files: ...}` names."""
    try:
        task = yaml.load(task_file.read_text(), _TaskFile)
    except (yaml.YAMLError, ValueError):
        return  # lm-eval says what is wrong with it
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
    """What is measured, and how; the same for baseline and candidate."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    task_dir: str | None = None
    """Folder of lm-eval task files, relative to the suite's file, for tasks that lm-eval does not ship."""
    engine: dict[str, Any] = Field(default={})
    """vLLM engine arguments for both sides: max_model_len, dtype, ..."""
    generation: dict[str, Any] = Field(default={})
    """Overrides of the tasks' generation_kwargs."""
    apply_chat_template: bool = False
    add_bos_token: bool = True
    sample_prompts: tuple[str, ...] = SAMPLE_PROMPTS
    """Prompts of the sample generation: greedy, before the tasks. Empty or repeating text is a finding."""
    serving: ServingWorkload | None = None
    """Timed after the tasks, with vLLM's benchmark code; None: not timed."""
    seed: int = 1234

    def digest(self) -> str:
        """sha256 of what is measured: the content of `task_dir` and of local data that its tasks name, not their place;
        neither description nor counts."""
        counts = {"__all__": {"documents", "subtasks"}}  # what the data are held to, not what is done with them
        content = self.model_dump(mode="json", exclude={"description": True, "task_dir": True, "tasks": counts})
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
    def _engine_leaves_the_subject_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        owned = {"model", "pretrained", "tokenizer", "quantization", "kv_cache_dtype", "revision"} & set(value)
        if owned:
            raise ValueError(f"{', '.join(sorted(owned))}: fp8pipe sets these, a suite cannot")
        return value


def load_suite(name: str) -> EvalSuite:
    """A shipped suite by name, or a suite file by path; `task_dir` comes back absolute."""
    path = find("suites", name)
    suite = load(EvalSuite, "suites", name)
    if suite.task_dir is None:
        return suite
    return suite.model_copy(update={"task_dir": str((path.parent / suite.task_dir).resolve())})
