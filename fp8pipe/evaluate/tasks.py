"""A suite's tasks as lm-eval loads them, and which of their documents are scored.

In: EvalSuite. Out: one Subject per suite entry: its leaf tasks with shots set, and its picks: documents in the order of
a seeded permutation, stratified over leaves. A longer look is a longer prefix, so that results can grow by appending.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8pipe.config import EvalSuite, TaskSpec
from fp8pipe.errors import ConfigError, HubUnreachable, InputError

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

FETCH_TIMEOUT_S = 20.0

Pick = tuple[str, int]
"""One document: name of the leaf task, document id in it."""


@dataclass(frozen=True)
class Subject:
    """One entry of the suite: an lm-eval task, group or tag."""

    name: str
    num_fewshot: int
    leaves: dict[str, Task]
    """What lm-eval scores, by name; the task itself when it is no group."""
    group: Group | None
    picks: tuple[Pick, ...]
    stops: tuple[int, ...]
    """Numbers of picks after which a gate looks, ascending; the last is all of them. A stretch is asked in one go."""

    @property
    def documents(self) -> int:
        """Documents that the task has, scored or not."""
        return sum(len(task.eval_docs) for task in self.leaves.values())

    @property
    def draws_examples(self) -> bool:
        """Whether the examples of a prompt are drawn, one document after the other: then a prompt depends on which
        documents are asked in the same go."""
        from lm_eval.api.samplers import FirstNSampler

        samplers = [getattr(task, "sampler", None) for task in self.leaves.values()]
        return self.num_fewshot > 0 and not all(isinstance(sampler, FirstNSampler) for sampler in samplers)

    def sample_ids(self) -> dict[str, list[int]]:
        """Document ids per leaf, ascending.

        lm-eval walks documents in dataset order whatever the order given, and takes the labels from the list given: any
        other order would label documents wrongly. A leaf without picks is left out: lm-eval would score all of it.
        """
        ids: dict[str, list[int]] = {}
        for leaf, document in self.picks:
            ids.setdefault(leaf, []).append(document)
        return {leaf: sorted(ids[leaf]) for leaf in self.leaves if leaf in ids}

    def scored(self) -> list[Task | Group]:
        """What to hand to lm-eval: the group while all its leaves are scored, else the leaves that are."""
        ids = self.sample_ids()
        if self.group is not None and len(ids) == len(self.leaves):
            return [self.group]
        return [self.leaves[leaf] for leaf in ids]


def load_subjects(suite: EvalSuite, *, limit: int | None, looks: tuple[float, ...] = (1.0,)) -> list[Subject]:
    """Load every task with its data; InputError for what lm-eval does not know or cannot do, HubUnreachable."""
    import datasets

    datasets.disable_caching()  # a task that shuffles while loading is to do so by the seed, not as an earlier run did
    manager = _task_manager(suite)
    subjects: list[Subject] = []
    for name, spec in suite.tasks.items():
        _seed_generators(suite.seed)
        loaded = _load(manager, name)
        leaves = dict(loaded["tasks"])
        for leaf, task in leaves.items():
            _set_shots(leaf, task, spec.num_fewshot)
        if seen := [s.name for s in subjects if s.leaves.keys() & leaves.keys()]:
            raise ConfigError(f"suite {suite.name}: {name} and {seen[0]} share tasks; name each task once")
        sizes = {leaf: len(task.eval_docs) for leaf, task in leaves.items()}
        _check_counts(name, spec, sizes)
        total = _wanted(name, sum(sizes.values()), spec.samples, limit)
        stops = tuple(dict.fromkeys(math.ceil(total * share) for share in looks))
        picks = permutation(sizes, suite.seed)[: stops[-1]]
        group = loaded.get("groups", {}).get(name)
        subjects.append(Subject(name, spec.num_fewshot, leaves, group, picks, stops))
    return subjects


def _task_manager(suite: EvalSuite) -> TaskManager:
    """An index of tasks; lm-eval's own 14,000 task files (several seconds) only when the suite needs them."""
    from lm_eval.tasks import TaskManager

    if suite.task_dir is not None:
        own = TaskManager(include_path=suite.task_dir, include_defaults=False)
        if all(_is_complete(own, name) for name in suite.tasks):
            return own
    manager = _all_tasks(suite.task_dir)
    for name in suite.tasks:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(f"suite {suite.name}: lm-eval knows no task {name!r}{hint}")
    return manager


@functools.cache
def _all_tasks(task_dir: str | None) -> TaskManager:
    """lm-eval's index of its own tasks and those of a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_dir)


def _is_complete(manager: TaskManager, name: str) -> bool:
    """Whether the index holds this task, or this group with all its parts; parts written in place are not traced."""
    entry = manager.task_index.get(name)
    if entry is None or entry.cfg is None:
        return False
    parts = entry.cfg.get("task")
    if not isinstance(parts, list):
        return True
    return all(isinstance(part, str) and _is_complete(manager, part) for part in parts)


def _seed_generators(seed: int) -> None:
    """As lm-eval does before it loads tasks: some shuffle while loading."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)


def _load(manager: TaskManager, name: str) -> TaskDict:
    import httpx
    import requests
    from datasets.exceptions import DatasetNotFoundError

    try:
        with sentence_splitter_or_refusal():
            return manager.load([name])
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise InputError(f"task {name}: its data is not there: {error}") from error
    except (ConnectionError, requests.ConnectionError, httpx.TransportError) as error:
        raise HubUnreachable(f"task {name}: its data could not be fetched: {error}") from error


@contextlib.contextmanager
def sentence_splitter_or_refusal() -> Iterator[None]:
    """Within: a task that needs NLTK's sentence splitter has it, or is refused with what to do.

    IFEval downloads it when its module is imported, goes on without it when that fails, and ends when the first answer
    is scored, after everything has been generated.
    """
    import nltk

    def fetch(resource: str, **_: Any) -> bool:
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(FETCH_TIMEOUT_S)
        try:
            if download(resource, quiet=True):
                return True
        finally:
            socket.setdefaulttimeout(before)
        raise InputError(
            f"NLTK's {resource} is not on this machine and could not be fetched; run `python -m nltk.downloader "
            f"{resource}` where there is a network, and set NLTK_DATA to the folder that holds tokenizers/{resource}"
        )

    download = nltk.download
    nltk.download = fetch
    try:
        yield
    finally:
        nltk.download = download


def _set_shots(name: str, task: Task, wanted: int) -> None:
    """Set the examples per prompt. A task that pins zero is left so by lm-eval, whatever is asked."""
    if task.get_config("num_fewshot") == 0 and wanted != 0:
        raise InputError(f"task {name} pins num_fewshot: 0; the suite asks for {wanted}: set it to 0 there")
    task.set_config(key="num_fewshot", value=wanted)


def _check_counts(name: str, spec: TaskSpec, sizes: dict[str, int]) -> None:
    """The data hold what the suite says: a plan rests on it, and a full run is told by it."""
    if spec.documents is None:
        return
    counted, found = (spec.documents, spec.subtasks or 1), (sum(sizes.values()), len(sizes))
    if counted != found:
        raise InputError(
            f"task {name}: the suite counts on {counted[0]} documents in {counted[1]} task(s), the data hold "
            f"{found[0]} in {found[1]}; correct its `documents` and `subtasks`, and plan again"
        )


def _wanted(name: str, total: int, samples: int | None, limit: int | None) -> int:
    """How many documents to score at the last look."""
    if samples is not None and samples > total:
        raise InputError(f"task {name}: the suite asks for {samples} samples, the task has {total} documents")
    wanted = total if samples is None else samples
    return wanted if limit is None else min(wanted, limit)


def permutation(sizes: dict[str, int], seed: int) -> tuple[Pick, ...]:
    """Every document once: each leaf shuffled by itself, interleaved so that any prefix holds each in proportion.

    The j-th document of a leaf with n stands at (j + 1/2) / n; ties go by the order of the leaves.
    """
    placed: list[tuple[float, int, Pick]] = []
    for order, (leaf, size) in enumerate(sizes.items()):
        documents = list(range(size))
        random.Random(f"{seed}:{leaf}").shuffle(documents)
        placed += [((j + 0.5) / size, order, (leaf, document)) for j, document in enumerate(documents)]
    return tuple(pick for _, _, pick in sorted(placed))
