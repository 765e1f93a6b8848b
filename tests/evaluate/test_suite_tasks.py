"""A suite's tasks: which documents are scored, in which order, and what is refused before an engine starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.evaluation import make_suite, make_tasks

from fp8pipe.config import TaskSpec, look_sizes
from fp8pipe.errors import ConfigError, InputError
from fp8pipe.evaluate.documents import count_documents
from fp8pipe.evaluate.tasks import load_tasks, permutation, sentence_splitter_or_refusal


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.dictionaries(st.text("abc", min_size=1), st.integers(1, 40), min_size=1, max_size=5), seed=st.integers()
)
def test_permutation_has_every_document_once_and_every_prefix_in_proportion(sizes: dict[str, int], seed: int) -> None:
    order = permutation(sizes, seed)
    assert sorted(order) == sorted((leaf, i) for leaf, n in sizes.items() for i in range(n))
    total = len(order)
    for length in range(1, total + 1):
        for leaf, size in sizes.items():
            share = sum(1 for name, _ in order[:length] if name == leaf)
            assert abs(share - size * length / total) <= len(sizes)


def test_permutation_depends_on_its_seed_alone() -> None:
    # Written out: results on disk are compared with later runs, so another order would void them.
    assert [document for _, document in permutation({"gsm8k": 8}, 1234)] == [4, 0, 6, 2, 3, 1, 5, 7]
    assert permutation({"a": 30}, 1) != permutation({"a": 30}, 2)


def test_a_look_scores_its_share_of_the_documents_rounded_up(task_dir: Path) -> None:
    assert look_sizes(25, (0.25, 0.5, 1.0)) == (7, 13, 25)
    suite = make_suite(task_dir, tiny_choose=TaskSpec(samples=9))
    [first] = load_tasks(suite, limit=None, looks=(0.5,))
    [second] = load_tasks(suite, limit=None, looks=(0.5, 1.0))
    assert (first.stops, second.stops) == ((5,), (5, 9))
    assert first.picks == second.picks[:5]
    [tiny] = load_tasks(suite, limit=1, looks=(0.25, 0.5, 1.0))
    assert tiny.stops == (1,)
    cut = [second.up_to(look) for look in (1, 2)]
    assert [(task.picks, task.ends) for task in cut] == [(task.picks, task.ends) for task in (first, second)]


def test_a_short_prefix_leaves_out_sub_tasks_without_documents(task_dir: Path) -> None:
    [task] = load_tasks(make_suite(task_dir, tiny_group=TaskSpec()), limit=1)
    assert task.sample_ids().keys() == {"tiny_part_a"}
    assert [getattr(item, "task_name", None) for item in task.scored()] == ["tiny_part_a"]
    [whole] = load_tasks(make_suite(task_dir, tiny_group=TaskSpec()), limit=None)
    assert {leaf: len(ids) for leaf, ids in whole.sample_ids().items()} == {"tiny_part_a": 24, "tiny_part_b": 8}
    assert whole.picks[:1] == task.picks


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ({"tiny_choose": TaskSpec(samples=25)}, InputError, "asks for 25 samples, the task has 24"),
        ({"tiny_group": TaskSpec(), "tiny_part_a": TaskSpec()}, ConfigError, "share tasks"),
        ({"tiny_choose": TaskSpec(documents=25)}, InputError, r"states 25 documents .* have 24 in 1"),
        ({"tiny_choose": TaskSpec(documents=23, samples=10)}, InputError, "states 23 documents"),
        ({"tiny_group": TaskSpec(documents=32)}, InputError, r"states 32 documents in 1 task.* have 32 in 2"),
        ({"tiny_group": TaskSpec(documents=32, subtasks=3)}, InputError, "in 3 task"),
    ],
)
def test_suite_that_cannot_be_measured_is_refused_when_its_tasks_are_loaded(
    task_dir: Path, tasks: dict[str, TaskSpec], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_tasks(make_suite(task_dir, **tasks), limit=None)


def test_data_that_match_the_suite_are_measured(task_dir: Path) -> None:
    stated = {"tiny_choose": TaskSpec(documents=24), "tiny_group": TaskSpec(documents=32, subtasks=2)}
    assert [len(task.picks) for task in load_tasks(make_suite(task_dir, **stated), limit=None)] == [24, 32]


def test_shots_for_a_task_that_pins_zero_are_refused(tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path / "tasks")
    path = tasks / "tiny_choose.yaml"
    path.write_text(path.read_text() + "num_fewshot: 0\n")
    with pytest.raises(InputError, match="pins num_fewshot: 0, the suite asks for 2"):
        load_tasks(make_suite(tasks, tiny_choose=TaskSpec(num_fewshot=2)), limit=None)


def test_ifeval_without_its_sentence_splitter_is_refused_before_anything_is_generated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)  # as NLTK answers without a network
    with (
        pytest.raises(InputError, match=r"punkt_tab is not on this machine.*NLTK_DATA"),
        sentence_splitter_or_refusal(),
    ):
        nltk.download("punkt_tab")


# ---------------------------------------------------------------------------------------------- counts, digests


def test_documents_and_sub_tasks_are_counted_once_where_the_suite_does_not_state_them(
    task_dir: Path, tmp_path: Path
) -> None:
    suite = make_suite(task_dir, tiny_group=TaskSpec(samples=32), tiny_choose=TaskSpec(documents=24, samples=5))
    found = count_documents(suite, tmp_path)
    assert (found.counts, found.subtasks) == ({"tiny_group": 32, "tiny_choose": 5}, {"tiny_group": 2})
    (tmp_path / "request.json").unlink()
    assert count_documents(suite, tmp_path) == found
    assert not (tmp_path / "request.json").exists()  # not counted again


def test_a_suite_whose_documents_cannot_be_counted_is_refused_as_the_worker_would(
    task_dir: Path, tmp_path: Path
) -> None:
    suite = make_suite(task_dir, tiny_choose=TaskSpec(samples=25))
    with pytest.raises(InputError, match=r"asks for 25 samples.*documents\.log"):
        count_documents(suite, tmp_path)


def test_stated_counts_are_no_part_of_what_is_measured(task_dir: Path) -> None:
    stated = make_suite(task_dir, tiny_group=TaskSpec(documents=32, subtasks=2))
    assert stated.digest() == make_suite(task_dir, tiny_group=TaskSpec()).digest()
    assert stated.digest() != make_suite(task_dir, tiny_group=TaskSpec(samples=32)).digest()


def test_changed_data_change_the_digest_of_a_suite(tmp_path: Path) -> None:
    suite = make_suite(make_tasks(tmp_path / "tasks"))
    before = suite.digest()
    data = tmp_path / "tasks" / "tiny_choose.jsonl"
    aside = tmp_path / "elsewhere.jsonl"
    task = tmp_path / "tasks" / "tiny_choose.yaml"
    task.write_text(task.read_text().replace(str(data), str(aside)) + "process_docs: !function utils.nothing\n")
    shutil.copy(data, aside)
    elsewhere = suite.digest()
    aside.write_text(aside.read_text() + "\n")
    assert len({before, elsewhere, suite.digest()}) == 3
