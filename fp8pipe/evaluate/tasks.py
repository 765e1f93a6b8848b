"""A suite's tasks as lm-eval loads them, and which of their documents are scored.

In: EvalSuite. Out: one Subject per suite entry: its leaf tasks with shots set, and its picks: documents in the order of
a seeded permutation, stratified over leaves. A longer look is a longer prefix, so that results can grow by appending.
"""

from __future__ import annotations

import difflib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8pipe.config import EvalSuite
from fp8pipe.errors import ConfigError, HubUnreachable, InputError

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

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


def load_subjects(suite: EvalSuite, *, limit: int | None) -> list[Subject]:
    """Load every task with its data; InputError for what lm-eval does not know or cannot do, HubUnreachable."""
    manager = _task_manager(suite)
    subjects: list[Subject] = []
    for name, spec in suite.tasks.items():
        loaded = _load(manager, name)
        leaves = dict(loaded["tasks"])
        for leaf, task in leaves.items():
            _set_shots(leaf, task, spec.num_fewshot)
        if seen := [s.name for s in subjects if s.leaves.keys() & leaves.keys()]:
            raise ConfigError(f"suite {suite.name}: {name} and {seen[0]} share tasks; name each task once")
        picks = _pick(
            name, {leaf: len(task.eval_docs) for leaf, task in leaves.items()}, spec.samples, limit, suite.seed
        )
        group = loaded.get("groups", {}).get(name)
        subjects.append(Subject(name, spec.num_fewshot, leaves, group, picks))
    return subjects


def _task_manager(suite: EvalSuite) -> TaskManager:
    """An index of tasks; lm-eval's own 14,000 task files (several seconds) only when the suite needs them."""
    from lm_eval.tasks import TaskManager

    if suite.task_dir is not None:
        own = TaskManager(include_path=suite.task_dir, include_defaults=False)
        if all(_is_complete(own, name) for name in suite.tasks):
            return own
    manager = TaskManager(include_path=suite.task_dir)
    for name in suite.tasks:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(f"suite {suite.name}: lm-eval knows no task {name!r}{hint}")
    return manager


def _is_complete(manager: TaskManager, name: str) -> bool:
    """Whether the index holds this task, or this group with all its parts; parts written in place are not traced."""
    entry = manager.task_index.get(name)
    if entry is None or entry.cfg is None:
        return False
    parts = entry.cfg.get("task")
    if not isinstance(parts, list):
        return True
    return all(isinstance(part, str) and _is_complete(manager, part) for part in parts)


def _load(manager: TaskManager, name: str) -> TaskDict:
    import httpx
    import requests
    from datasets.exceptions import DatasetNotFoundError

    try:
        return manager.load([name])
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise InputError(f"task {name}: its data is not there: {error}") from error
    except (ConnectionError, requests.ConnectionError, httpx.TransportError) as error:
        raise HubUnreachable(f"task {name}: its data could not be fetched: {error}") from error


def _set_shots(name: str, task: Task, wanted: int) -> None:
    """Set the examples per prompt. A task that pins zero is left so by lm-eval, whatever is asked."""
    if task.get_config("num_fewshot") == 0 and wanted != 0:
        raise InputError(f"task {name} pins num_fewshot: 0; the suite asks for {wanted}: set it to 0 there")
    task.set_config(key="num_fewshot", value=wanted)


def _pick(name: str, sizes: dict[str, int], samples: int | None, limit: int | None, seed: int) -> tuple[Pick, ...]:
    total = sum(sizes.values())
    if samples is not None and samples > total:
        raise InputError(f"task {name}: the suite asks for {samples} samples, the task has {total} documents")
    wanted = total if samples is None else samples
    return permutation(sizes, seed)[: wanted if limit is None else min(wanted, limit)]


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
