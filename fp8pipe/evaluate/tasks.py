"""A suite's tasks as lm-eval loads them, and which of their documents are scored.

An EvalSuite in, one LoadedTask per suite entry out: its leaf tasks with their few-shot examples set, and its picks, the
documents to score, in the order of a seeded permutation that is stratified over the leaves. A later look takes a longer
prefix of it, so results grow by appending.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fp8pipe.config import EvalSuite, TaskSpec, look_sizes
from fp8pipe.errors import ConfigError, HubUnreachable, InputError

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

FETCH_TIMEOUT_S = 20.0

Pick = tuple[str, int]
"""One document: name of its leaf task, and its id there."""


@dataclass(frozen=True)
class LoadedTask:
    """One entry of the suite, an lm-eval task, group or tag, with its data."""

    name: str
    num_fewshot: int
    leaves: dict[str, Task]
    """The tasks that lm-eval scores, by name: those of the group, or the task itself."""
    group: Group | None
    picks: tuple[Pick, ...]
    """Documents to score, in order."""
    ends: tuple[int, ...]
    """Number of picks at the end of each look; the last is all of them. Looks at few documents may end at the same."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Numbers of picks at which a look ends, ascending. What lies between two of them is scored in one pass."""
        return tuple(dict.fromkeys(self.ends))

    def up_to(self, look: int) -> LoadedTask:
        """This task cut short at that look, counted from 1."""
        return replace(self, picks=self.picks[: self.ends[look - 1]], ends=self.ends[:look])

    @property
    def documents(self) -> int:
        """Number of documents that the task has, scored or not."""
        return sum(len(task.eval_docs) for task in self.leaves.values())

    @property
    def draws_examples(self) -> bool:
        """Whether few-shot examples are drawn from one random stream, document by document. A prompt then depends on
        which documents are scored in the same pass."""
        from lm_eval.api.samplers import FirstNSampler

        samplers = [getattr(task, "sampler", None) for task in self.leaves.values()]
        return self.num_fewshot > 0 and not all(isinstance(sampler, FirstNSampler) for sampler in samplers)

    def sample_ids(self) -> dict[str, list[int]]:
        """Ids of the picked documents per leaf, ascending.

        lm-eval always walks documents in dataset order but labels them in the order of this list, so any other order
        would label them wrongly. A leaf without picks is left out, since lm-eval would score all of it.
        """
        ids: dict[str, list[int]] = {}
        for leaf, document in self.picks:
            ids.setdefault(leaf, []).append(document)
        return {leaf: sorted(ids[leaf]) for leaf in self.leaves if leaf in ids}

    def scored(self) -> list[Task | Group]:
        """The tasks to pass to lm-eval: the group if all its leaves have picks, else the leaves that do."""
        ids = self.sample_ids()
        if self.group is not None and len(ids) == len(self.leaves):
            return [self.group]
        return [self.leaves[leaf] for leaf in ids]


def load_tasks(suite: EvalSuite, *, limit: int | None, looks: tuple[float, ...] = (1.0,)) -> list[LoadedTask]:
    """Load every task of the suite with its data.

    Raises InputError for a task that lm-eval does not know, or that cannot be scored as the suite asks; HubUnreachable.
    """
    import datasets

    datasets.disable_caching()  # a task that shuffles while loading must follow the seed, not an earlier run
    manager = _task_manager(suite)
    found: list[LoadedTask] = []
    for name, spec in suite.tasks.items():
        _seed_generators(suite.seed)
        loaded = _load(manager, name)
        leaves = dict(loaded["tasks"])
        for leaf, task in leaves.items():
            _set_shots(leaf, task, spec.num_fewshot)
        if seen := [other.name for other in found if other.leaves.keys() & leaves.keys()]:
            raise ConfigError(f"suite {suite.name}: {name} and {seen[0]} share tasks; name each task once")
        sizes = {leaf: len(task.eval_docs) for leaf, task in leaves.items()}
        _check_counts(name, spec, sizes)
        total = _samples(name, sum(sizes.values()), spec.samples, limit)
        ends = look_sizes(total, looks)
        picks = permutation(sizes, suite.seed)[: ends[-1]]
        group = loaded.get("groups", {}).get(name)
        found.append(LoadedTask(name, spec.num_fewshot, leaves, group, picks, ends))
    return found


def _task_manager(suite: EvalSuite) -> TaskManager:
    """An index of tasks. lm-eval's own 14,000 task files, which take seconds, are read only if the suite needs them."""
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
    """Index of lm-eval's own tasks and those in `task_dir`."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_dir)


def _is_complete(manager: TaskManager, name: str) -> bool:
    """Whether the index has this task, or this group with all its parts. Parts written inline count as missing."""
    entry = manager.task_index.get(name)
    if entry is None or entry.cfg is None:
        return False
    parts = entry.cfg.get("task")
    if not isinstance(parts, list):
        return True
    return all(isinstance(part, str) and _is_complete(manager, part) for part in parts)


def _seed_generators(seed: int) -> None:
    """Seed Python and numpy, as lm-eval does before it loads tasks, since some tasks shuffle while loading."""
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
        raise InputError(f"task {name}: its data were not found: {error}") from error
    except (ConnectionError, requests.ConnectionError, httpx.TransportError) as error:
        raise HubUnreachable(f"task {name}: its data could not be downloaded: {error}") from error


@contextlib.contextmanager
def sentence_splitter_or_refusal() -> Iterator[None]:
    """Inside the context, a task whose NLTK sentence splitter is missing and cannot be downloaded raises InputError.

    IFEval downloads the splitter when its module is imported. If that fails, it continues, and crashes when it scores
    the first answer, after everything has been generated.
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
            f"NLTK's {resource} is not on this machine and could not be downloaded; run `python -m nltk.downloader "
            f"{resource}` where there is a network, and set NLTK_DATA to the folder that contains tokenizers/{resource}"
        )

    download = nltk.download
    nltk.download = fetch
    try:
        yield
    finally:
        nltk.download = download


def _set_shots(name: str, task: Task, wanted: int) -> None:
    """Set the number of few-shot examples. lm-eval ignores the request for a task that pins zero."""
    if task.get_config("num_fewshot") == 0 and wanted != 0:
        raise InputError(f"task {name} pins num_fewshot: 0, the suite asks for {wanted}; set it to 0 in the suite")
    task.set_config(key="num_fewshot", value=wanted)


def _check_counts(name: str, spec: TaskSpec, sizes: dict[str, int]) -> None:
    """The data must be what the suite states: plans and the gate's count of samples rely on it."""
    if spec.documents is None:
        return
    stated, found = (spec.documents, spec.subtasks or 1), (sum(sizes.values()), len(sizes))
    if stated != found:
        raise InputError(
            f"task {name}: the suite states {stated[0]} documents in {stated[1]} task(s), the data have {found[0]} in "
            f"{found[1]}; correct `documents` and `subtasks` in the suite, and plan again"
        )


def _samples(name: str, documents: int, samples: int | None, limit: int | None) -> int:
    """How many of a task's documents to score in all."""
    if samples is not None and samples > documents:
        raise InputError(f"task {name}: the suite asks for {samples} samples, the task has {documents} documents")
    asked = documents if samples is None else samples
    return asked if limit is None else min(asked, limit)


def permutation(sizes: dict[str, int], seed: int) -> tuple[Pick, ...]:
    """Every document once, each leaf shuffled and all interleaved, so that any prefix has each leaf in proportion.

    `sizes` are the documents per leaf. The j-th of a leaf's n documents is placed at (j + 1/2) / n; ties follow the
    order of the leaves.
    """
    placed: list[tuple[float, int, Pick]] = []
    for order, (leaf, size) in enumerate(sizes.items()):
        documents = list(range(size))
        random.Random(f"{seed}:{leaf}").shuffle(documents)
        placed += [((j + 0.5) / size, order, (leaf, document)) for j, document in enumerate(documents)]
    return tuple(pick for _, _, pick in sorted(placed))
