"""The room `evaluate`: supervision, samples and results, and real vLLM runs."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.evaluation import make_fp8_kv_twin, make_suite, make_tasks, make_tiny_llama
from support.processes import all_gone, running

from fp8pipe.config import EvalSuite, TaskSpec
from fp8pipe.errors import ConfigError, EngineFailed, InputError, ModelNotFound, SourceChanged
from fp8pipe.evaluate import baseline_key, evaluate
from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.evaluate.tasks import permutation
from fp8pipe.machine.supervise import Ending, supervise
from fp8pipe.progress import ProgressEvent
from fp8pipe.records import EvalReport, Retry

# ---------------------------------------------------------------------------------------------- supervision

FAMILY = """
import subprocess, sys, time, pathlib, os, signal
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
"""
"""A command that starts a process of its own and writes both pids into the file it is given."""


def family(folder: Path, then: str) -> tuple[list[str], Path]:
    """FAMILY continued by `then`, as a command, and the file its pids will be in."""
    script = folder / "family.py"
    script.write_text(FAMILY + textwrap.dedent(then))
    return [sys.executable, str(script), str(folder / "pids")], folder / "pids"


def pids_in(path: Path) -> list[int]:
    deadline = time.monotonic() + 60
    while not (path.exists() and len(path.read_text().split()) == 2):
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.02)
    return [int(pid) for pid in path.read_text().split()]


def test_supervise_tells_exit_status_log_and_messages(tmp_path: Path) -> None:
    script = tmp_path / "talker.py"
    script.write_text(
        "from fp8pipe.machine.supervise import take_channel\n"
        "tell = take_channel()\ntell({'n': 1})\nprint('hello', flush=True)\n"
        "tell({'n': 2, 'pad': 'x' * 200_000})\nexit(3)"
    )
    messages: list[dict[str, Any]] = []
    ending = supervise([sys.executable, str(script)], log=tmp_path / "log", on_message=messages.append)
    assert (ending.reason, ending.returncode, ending.succeeded) == ("exited", 3, False)
    assert [message["n"] for message in messages] == [1, 2]
    assert ending.tail() == "hello"


def test_supervise_reports_the_signal_that_killed_the_command(tmp_path: Path) -> None:
    ending = supervise([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], log=tmp_path / "log")
    assert (ending.reason, ending.returncode) == ("exited", 137)


@pytest.mark.parametrize(("limit", "reason"), [("timeout_s", "timeout"), ("stall_s", "stalled")])
def test_supervise_ends_the_whole_group_at_its_limit(tmp_path: Path, limit: str, reason: str) -> None:
    command, pids = family(tmp_path, "time.sleep(600)")
    ending = supervise(command, log=tmp_path / "log", **{limit: 3.0})  # pyright: ignore[reportArgumentType]
    assert ending.reason == reason
    assert all_gone(pids_in(pids))


def test_supervise_does_not_call_a_command_that_logs_stalled(tmp_path: Path) -> None:
    code = "import time\nfor i in range(12): print(i, flush=True); time.sleep(0.25)"
    ending = supervise([sys.executable, "-c", code], log=tmp_path / "log", stall_s=2.0)
    assert ending.succeeded


def test_supervise_ends_a_command_that_does_nothing_but_log_as_stalled(tmp_path: Path) -> None:
    command, pids = family(tmp_path, "[(print(i, flush=True), time.sleep(0.2)) for i in range(3000)]")
    ending = supervise(command, log=tmp_path / "log", stall_s=1.0)
    assert ending.reason == "stalled"
    assert all_gone(pids_in(pids))


def test_supervise_kills_a_command_that_ignores_term(tmp_path: Path) -> None:
    command, pids = family(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)")
    ending = supervise(command, log=tmp_path / "log", timeout_s=3.0, grace_s=0.5)
    assert ending.reason == "timeout"
    assert all_gone(pids_in(pids))


STOP_ALL = """
os.kill(child.pid, signal.SIGSTOP)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_supervise_ends_a_stopped_group_as_stalled(tmp_path: Path) -> None:
    command, pids = family(tmp_path, STOP_ALL)
    ending = supervise(command, log=tmp_path / "log", stall_s=3.0, grace_s=30.0)
    assert ending.reason == "stalled"
    assert all_gone(pids_in(pids))


@pytest.mark.parametrize(
    "then",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "time.sleep(600)",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
        "os.kill(resource_tracker._resource_tracker._pid, signal.SIGSTOP); os.kill(os.getpid(), signal.SIGSTOP)",
    ],
    ids=["killed", "asleep", "deaf", "stopped"],
)
def test_supervise_leaves_no_shared_memory(tmp_path: Path, then: str) -> None:
    command, _ = family(
        tmp_path,
        f"""
        from multiprocessing import resource_tracker, shared_memory
        block = shared_memory.SharedMemory(create=True, size=4096)
        print(block.name, flush=True)
        {then}
        """,
    )
    ending = supervise(command, log=tmp_path / "log", timeout_s=4.0, grace_s=1.0)
    block = Path("/dev/shm", ending.log.read_text().split()[0])
    assert "psm" in block.name
    assert not block.exists()


def test_supervise_lets_a_command_that_heeds_term_clean_up(tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGTERM, lambda *a: (print('cleaned up', flush=True), os._exit(0))); time.sleep(600)"
    command, _ = family(tmp_path, code)
    ending = supervise(command, log=tmp_path / "log", timeout_s=3.0, grace_s=30.0)
    assert ending.tail() == "cleaned up"


def test_supervise_leaves_nothing_of_a_command_that_ended_well(tmp_path: Path) -> None:
    command, pids = family(tmp_path, "")
    assert supervise(command, log=tmp_path / "log").succeeded
    assert all_gone(pids_in(pids))


def test_supervise_ends_the_group_when_the_caller_is_interrupted(tmp_path: Path) -> None:
    command, pids = family(
        tmp_path, "from fp8pipe.machine.supervise import take_channel; take_channel()({}); time.sleep(600)"
    )

    def interrupt(message: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(command, log=tmp_path / "log", on_message=interrupt)
    assert all_gone(pids_in(pids))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_supervise_group_ends_when_its_parent_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    command, pids = family(tmp_path, "time.sleep(600)")
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from fp8pipe.machine.supervise import supervise\n"
            "supervise(sys.argv[2:], log=Path(sys.argv[1]), grace_s=0.5)",
            str(tmp_path / "log"),
            *command,
        ]
    )
    members = pids_in(pids)
    assert all(running(pid) for pid in members)
    parent.send_signal(number)
    parent.wait()
    assert all_gone(members)


def test_supervise_command_dies_with_its_guard(tmp_path: Path) -> None:
    command, pids = family(tmp_path, "os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)")
    ending = supervise(command, log=tmp_path / "log")
    assert ending.returncode == -signal.SIGKILL
    assert all_gone(pids_in(pids))


def test_ending_tail_is_the_end_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a\n\nb\rc\n" + "d" * 1000 + "\n")
    tail = Ending("exited", 0, 1.0, tmp_path / "log").tail(lines=2)
    assert tail == "c\n" + "d" * 400


# ---------------------------------------------------------------------------------------------- samples


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.dictionaries(st.text("abc", min_size=1), st.integers(1, 40), min_size=1, max_size=5), seed=st.integers()
)
def test_permutation_holds_every_document_once_and_every_prefix_in_proportion(sizes: dict[str, int], seed: int) -> None:
    order = permutation(sizes, seed)
    assert sorted(order) == sorted((leaf, i) for leaf, n in sizes.items() for i in range(n))
    total = len(order)
    for length in range(1, total + 1):
        for leaf, size in sizes.items():
            share = sum(1 for name, _ in order[:length] if name == leaf)
            assert abs(share - size * length / total) <= len(sizes)


def test_permutation_is_fixed_by_its_seed_alone() -> None:
    # Written out: results on disk are compared with later runs, so another order would void them.
    assert [document for _, document in permutation({"gsm8k": 8}, 1234)] == [4, 0, 6, 2, 3, 1, 5, 7]
    assert permutation({"a": 30}, 1) != permutation({"a": 30}, 2)


@pytest.fixture(scope="session")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("suite") / "tasks")


def test_subjects_of_a_short_look_leave_out_parts_without_documents(task_dir: Path) -> None:
    from fp8pipe.evaluate.tasks import load_subjects

    [subject] = load_subjects(make_suite(task_dir, tiny_group=TaskSpec()), limit=1)
    assert subject.sample_ids().keys() == {"tiny_part_a"}
    assert [getattr(item, "task_name", None) for item in subject.scored()] == ["tiny_part_a"]
    [whole] = load_subjects(make_suite(task_dir, tiny_group=TaskSpec()), limit=None)
    assert {leaf: len(ids) for leaf, ids in whole.sample_ids().items()} == {"tiny_part_a": 24, "tiny_part_b": 8}
    assert whole.picks[:1] == subject.picks


@pytest.mark.parametrize(
    ("tasks", "error", "says"),
    [
        ({"tiny_chose": TaskSpec()}, ConfigError, "did you mean .*tiny_choose"),
        ({"tiny_choose": TaskSpec(samples=25)}, InputError, "asks for 25 samples, the task has 24"),
        ({"tiny_group": TaskSpec(), "tiny_part_a": TaskSpec()}, ConfigError, "share tasks"),
        ({"tiny_choose": TaskSpec(documents=25)}, InputError, r"counts on 25 documents .* hold 24 in 1"),
        ({"tiny_choose": TaskSpec(documents=23, samples=10)}, InputError, "counts on 23 documents"),
        ({"tiny_group": TaskSpec(documents=32)}, InputError, r"counts on 32 documents in 1 task.* hold 32 in 2"),
        ({"tiny_group": TaskSpec(documents=32, subtasks=3)}, InputError, "in 3 task"),
    ],
)
def test_suite_that_cannot_be_measured_is_refused_before_an_engine_starts(
    task_dir: Path, tasks: dict[str, TaskSpec], error: type[Exception], says: str
) -> None:
    from fp8pipe.evaluate.tasks import load_subjects

    with pytest.raises(error, match=says):
        load_subjects(make_suite(task_dir, **tasks), limit=None)


def test_data_that_hold_what_the_suite_says_are_measured(task_dir: Path) -> None:
    from fp8pipe.evaluate.tasks import load_subjects

    counted = {"tiny_choose": TaskSpec(documents=24), "tiny_group": TaskSpec(documents=32, subtasks=2)}
    assert [len(s.picks) for s in load_subjects(make_suite(task_dir, **counted), limit=None)] == [24, 32]


def test_documents_and_sub_tasks_are_counted_where_the_suite_does_not_tell(task_dir: Path, tmp_path: Path) -> None:
    from fp8pipe.evaluate.documents import count_documents

    suite = make_suite(task_dir, tiny_group=TaskSpec(samples=32), tiny_choose=TaskSpec(documents=24, samples=5))
    found = count_documents(suite, tmp_path)
    assert (found.counts, found.subtasks) == ({"tiny_group": 32, "tiny_choose": 5}, {"tiny_group": 2})
    (tmp_path / "request.json").unlink()
    assert count_documents(suite, tmp_path) == found
    assert not (tmp_path / "request.json").exists()  # not counted again


def test_what_the_data_are_held_to_is_no_part_of_what_is_measured(task_dir: Path) -> None:
    counted = make_suite(task_dir, tiny_group=TaskSpec(documents=32, subtasks=2))
    assert counted.digest() == make_suite(task_dir, tiny_group=TaskSpec()).digest()
    assert counted.digest() != make_suite(task_dir, tiny_group=TaskSpec(samples=32)).digest()


def test_shots_for_a_task_that_pins_zero_are_refused(tmp_path: Path) -> None:
    from fp8pipe.evaluate.tasks import load_subjects

    tasks = make_tasks(tmp_path / "tasks")
    path = tasks / "tiny_choose.yaml"
    path.write_text(path.read_text() + "num_fewshot: 0\n")
    with pytest.raises(InputError, match="pins num_fewshot: 0; the suite asks for 2"):
        load_subjects(make_suite(tasks, tiny_choose=TaskSpec(num_fewshot=2)), limit=None)


# ---------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="session")
def group_run(task_dir: Path) -> tuple[Any, dict[str, Any]]:
    """The group's subject and what lm-eval says of its own random model on it."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from fp8pipe.evaluate.tasks import load_subjects

    [subject] = load_subjects(make_suite(task_dir, tiny_group=TaskSpec(num_fewshot=1, samples=20)), limit=None)
    scored: list[Any] = list(subject.scored())
    options: dict[str, Any] = {"samples": subject.sample_ids(), "task_manager": TaskManager(include_defaults=False)}
    results = simple_evaluate(model="dummy", tasks=scored, bootstrap_iters=100, **options)
    assert results is not None
    return subject, dict(results)


def test_group_result_follows_the_permutation_and_names_its_clusters(group_run: tuple[Any, dict[str, Any]]) -> None:
    from fp8pipe.evaluate.results import task_result

    subject, results = group_run
    task = task_result(subject, results, set())
    assert task.clusters == tuple(leaf for leaf, _ in subject.picks)
    assert task.doc_ids == tuple(i + (24 if leaf == "tiny_part_b" else 0) for leaf, i in subject.picks)
    acc = task.samples_of("acc", "none")
    assert acc is not None
    by_document = {(leaf, s["doc_id"]): s for leaf in results["samples"] for s in results["samples"][leaf]}
    assert acc.values == tuple(by_document[pick]["acc"] for pick in subject.picks)
    assert task.doc_hashes == tuple(by_document[pick]["doc_hash"] for pick in subject.picks)
    assert acc.mean == pytest.approx(results["groups"]["tiny_group"]["acc,none"])
    assert (task.version, task.num_fewshot) == ("3.0", 1)


def test_samples_carry_the_ids_of_their_own_documents(group_run: tuple[Any, dict[str, Any]]) -> None:
    _, results = group_run
    for leaf in results["samples"]:
        for sample in results["samples"][leaf]:
            assert sample["doc"]["question"].startswith(f"{sample['doc_id']} plus")


def broken_copy(results: dict[str, Any], change: str) -> dict[str, Any]:
    samples = {leaf: [dict(s) for s in rows] for leaf, rows in results["samples"].items()}
    rows = samples["tiny_part_a"]
    if change == "missing":
        rows.pop()
    elif change == "twice":
        rows.append(rows[0])
    elif change == "unasked":
        rows.append(rows[0] | {"doc_id": 99})
    elif change == "metric":
        rows[0]["metrics"] = ["acc"]
    shots = results["n-shot"] | ({"tiny_part_a": 0} if change == "shots" else {})
    return results | {"samples": samples, "n-shot": shots}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ("missing", EngineFailed, "expected 15 documents, found 14"),
        ("twice", EngineFailed, "twice"),
        ("unasked", EngineFailed, "expected 15 documents, found 16"),
        ("metric", InputError, "different metrics"),
        ("shots", EngineFailed, "ran 0 shots, expected 1"),
    ],
)
def test_results_other_than_asked_are_errors(
    group_run: tuple[Any, dict[str, Any]], change: str, error: type[Exception], says: str
) -> None:
    from fp8pipe.evaluate.results import task_result

    subject, results = group_run
    with pytest.raises(error, match=says):
        task_result(subject, broken_copy(results, change), set())


def test_nan_reaches_the_record_and_survives_its_file(group_run: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    from fp8pipe.evaluate.results import task_result
    from fp8pipe.records import TaskResult

    subject, results = group_run
    changed = broken_copy(results, "none")
    leaf, document = subject.picks[2]
    next(s for s in changed["samples"][leaf] if s["doc_id"] == document)["acc"] = math.nan
    loaded = TaskResult.load(task_result(subject, changed, set()).save(tmp_path / "task.json"))
    acc = loaded.samples_of("acc", "none")
    assert acc is not None
    assert math.isnan(acc.values[2])
    assert math.isnan(acc.mean)


# ---------------------------------------------------------------------------------------------- without an engine

VERSIONS = {"vllm": "0.32.0+cpu", "lm_eval": "0.4.13", "transformers": "5.19.0", "torch": "2.13.0+cpu"}
REPORT = """
from fp8pipe.records import EngineFacts, EvalReport
from fp8pipe.evaluate.request import EvalRequest
request = EvalRequest.load(path)
facts = EngineFacts(linear_kernels=(), attention_backend="", kv_cache_dtype="auto", quantization=None, dtype="bfloat16",
                    max_model_len=1, arguments={}, device_class="cpu", device_name="cpu", plugin=None)
EvalReport(role=request.role, model_id="m", fingerprint=request.fingerprint, suite="tiny", suite_digest="d",
           engine=facts, tasks=(), add_bos_token=True, chat_template_hash=None, tokenizer_hash="t", seeds={},
           versions={}, table="", seconds={}, retries=request.retries).save(path.with_name("report.json"))
"""


def interpreter(folder: Path, worker: str) -> str:
    """A program in the place of the interpreter that has vLLM: it tells VERSIONS, and as the worker runs `worker`."""
    path = folder / "python"
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\nfrom pathlib import Path\n"
        f"if sys.argv[1] == '-I':\n    print(json.dumps({VERSIONS!r}))\n    sys.exit()\n"
        f"path = Path(sys.argv[-1])\n(path.parent / 'started').open('a').write('x')\n{textwrap.dedent(worker)}"
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def run(model: Path, folder: Path, suite: EvalSuite | None = None, **options: Any) -> EvalReport:
    suite = suite or EvalSuite(name="tiny", tasks={"t": TaskSpec()})
    return evaluate(model, suite, folder, **({"role": "baseline", "model_id": "m", "fingerprint": "f"} | options))


def test_finished_report_is_returned_without_starting_anything(model: Path, tmp_path: Path) -> None:
    python, folder = interpreter(tmp_path, REPORT), tmp_path / "evaluation"
    first = run(model, folder, python=python)
    assert run(model, folder, python=python) == first
    assert (folder / "started").read_text() == "x"


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "g"},
        {"role": "candidate"},
        {"limit": 5},
        {"kv_cache_dtype": "fp8"},
        {"online": "fp8"},
        {"suite": EvalSuite(name="tiny", tasks={"t": TaskSpec(num_fewshot=1)})},
        {"suite": EvalSuite(name="tiny", tasks={"t": TaskSpec()}, engine={"max_model_len": 9})},
    ],
    ids=lambda change: next(iter(change)),
)
def test_report_of_another_request_is_not_reused(model: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    python, folder = interpreter(tmp_path, REPORT), tmp_path / "evaluation"
    run(model, folder, python=python)
    run(model, folder, python=python, **change)
    assert (folder / "started").read_text() == "xx"


def test_description_and_place_of_a_suite_are_no_reason_to_measure_again(model: Path, tmp_path: Path) -> None:
    one, other = make_tasks(tmp_path / "one"), tmp_path / "other"
    shutil.copytree(one, other)
    suite = make_suite(one)
    moved = suite.model_copy(update={"task_dir": str(other), "description": "the same"})
    assert baseline_key("sha", suite) == baseline_key("sha", moved)
    (other / "tiny_choose.yaml").write_text("task: changed\n")
    assert baseline_key("sha", suite) != baseline_key("sha", moved)
    assert baseline_key("sha", suite) != baseline_key("another", suite)


def test_changed_data_are_measured_again(tmp_path: Path) -> None:
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


def test_unfinished_run_leaves_no_report_of_an_earlier_one(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    run(model, folder, python=interpreter(tmp_path, REPORT))
    with pytest.raises(EngineFailed):
        run(model, folder, python=interpreter(tmp_path, "sys.exit(1)"), fingerprint="g")
    assert not (folder / "report.json").exists()


def test_failing_engine_names_cause_log_tail_and_log(model: Path, tmp_path: Path) -> None:
    worker = """
        print("loading shard 1")
        raise RuntimeError("CUDA error: no kernel image")
    """
    with pytest.raises(EngineFailed) as caught:
        run(model, tmp_path / "evaluation", python=interpreter(tmp_path, worker))
    message = str(caught.value)
    assert "exit 1): RuntimeError: CUDA error: no kernel image" in message
    assert "  | loading shard 1" in message
    assert str(tmp_path / "evaluation" / "worker.log") in message


def test_killed_engine_is_explained_as_lack_of_memory(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="ran out of memory"):
        run(model, tmp_path / "evaluation", python=interpreter(tmp_path, "os.kill(os.getpid(), 9)"))


def test_engine_that_was_killed_is_started_anew_with_less_and_the_report_says_so(model: Path, tmp_path: Path) -> None:
    worker = f"""
if len((path.parent / "started").read_text()) < 3:
    os.kill(os.getpid(), 9)
{REPORT}
"""
    report = run(model, tmp_path / "evaluation", python=interpreter(tmp_path, worker))
    assert ["killed (signal 9)" in retry.cause for retry in report.retries] == [True, True]
    first, second = (retry.changed for retry in report.retries)
    assert (first["max_num_seqs"], second["max_num_seqs"]) == (64, 16)
    assert "max_model_len" not in first
    assert second["max_model_len"] == 2048
    run(model, tmp_path / "evaluation", python=interpreter(tmp_path, "sys.exit(1)"))  # finished: not started again


def test_a_candidate_begins_with_what_its_baseline_had_to_do_without(model: Path, tmp_path: Path) -> None:
    python, folder = interpreter(tmp_path, REPORT), tmp_path / "evaluation"
    assert run(model, folder, python=python).retries == ()
    needed = (Retry(cause="out of memory", changed={"max_model_len": 512}),)
    assert run(model, folder, python=python, retries=needed).retries == needed
    assert EvalRequest.load(folder / "request.json").reduced == {"max_model_len": 512}
    assert run(model, folder, python=interpreter(tmp_path, "sys.exit(1)"), retries=needed).retries == needed


@pytest.mark.parametrize(
    ("limit", "says"), [({"timeout_s": 2.0}, "not finished after"), ({"stall_s": 2.0}, "no sign of life")]
)
def test_evaluation_that_takes_too_long_or_hangs_fails(
    model: Path, tmp_path: Path, limit: dict[str, Any], says: str
) -> None:
    python = interpreter(tmp_path, "path.with_name('pid').write_text(str(os.getpid())); time.sleep(600)")
    with pytest.raises(EngineFailed, match=says):
        run(model, tmp_path / "evaluation", python=python, **limit)
    assert all_gone([int((tmp_path / "evaluation" / "pid").read_text())])


def test_error_of_the_worker_keeps_its_class(model: Path, tmp_path: Path) -> None:
    worker = """
        from fp8pipe.machine.supervise import take_channel
        take_channel()({"error": "ConfigError", "message": "lm-eval knows no task 't'"})
        sys.exit(2)
    """
    with pytest.raises(ConfigError, match="knows no task 't'"):
        run(model, tmp_path / "evaluation", python=interpreter(tmp_path, worker))


def test_candidate_altered_while_measured_voids_the_measurement(model: Path, tmp_path: Path) -> None:
    worker = REPORT + "\n(Path(request.model) / 'config.json').write_text('{\"changed\": 1}')\n"
    with pytest.raises(SourceChanged):
        run(model, tmp_path / "evaluation", python=interpreter(tmp_path, worker), role="candidate")
    assert not (tmp_path / "evaluation" / "report.json").exists()


def test_folder_without_a_model_and_program_without_vllm_are_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        run(tmp_path / "nothing", tmp_path / "evaluation")
    with pytest.raises(EngineFailed, match="not an interpreter"):
        run(model, tmp_path / "evaluation", python=str(tmp_path / "nowhere"))
    with pytest.raises(EngineFailed, match="cannot tell its vLLM and lm-eval versions"):
        run(model, tmp_path / "evaluation", python="/bin/false")


def test_asking_for_evaluate_imports_neither_torch_nor_vllm() -> None:
    code = """
import sys
from fp8pipe.config import EvalSuite, TaskSpec
from fp8pipe.evaluate import baseline_key
baseline_key("sha", EvalSuite(name="s", tasks={"t": TaskSpec()}))
exit(", ".join({"torch", "vllm", "lm_eval", "transformers"} & sys.modules.keys()) or 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------- real vLLM


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def baseline(tiny_llama: Path, task_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalReport:
    return run(tiny_llama, tmp_path_factory.mktemp("baseline"), make_suite(task_dir))


@pytest.fixture(scope="session")
def candidate(
    tiny_llama: Path, task_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvalReport, list[ProgressEvent]]:
    folder = tmp_path_factory.mktemp("candidate")
    fp8, events = make_fp8_kv_twin(tiny_llama, folder / "fp8"), []
    options = {"role": "candidate", "kv_cache_dtype": "fp8", "progress": events.append}
    return run(fp8, folder / "evaluation", make_suite(task_dir), **options), events


@pytest.mark.vllm
def test_report_equals_what_lm_evals_command_line_says(
    baseline: EvalReport, tiny_llama: Path, task_dir: Path, tmp_path: Path
) -> None:
    samples = {task.task: sorted(task.doc_ids) for task in baseline.tasks}
    arguments = f"pretrained={tiny_llama},max_model_len=256,add_bos_token=True,seed=7"
    command = [sys.executable, "-m", "fp8pipe.evaluate.lm_eval", "run", "--model", "vllm", "--model_args", arguments]
    command += ["--tasks", *samples, "--include_path", str(task_dir), "--num_fewshot", "2", "--seed", "7"]
    command += ["--samples", json.dumps(samples), "--log_samples", "--output_path", str(tmp_path)]
    subprocess.run(command, check=True, stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT)
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    for task in baseline.tasks:
        logged = [json.loads(line) for line in next(tmp_path.rglob(f"samples_{task.task}_*")).read_text().splitlines()]
        for metric in task.metrics:
            key = f"{metric.metric},{metric.filter}"
            assert metric.mean == results[task.task][key]
            assert metric.stderr == results[task.task][f"{metric.metric}_stderr,{metric.filter}"]
            theirs = {s["doc_id"]: (s[metric.metric], s["prompt_hash"]) for s in logged if s["filter"] == metric.filter}
            ours = zip(metric.values, task.prompt_hashes, strict=True)
            assert dict(zip(task.doc_ids, ours, strict=True)) == theirs


@pytest.mark.vllm
def test_facts_name_the_fp8_kernels_and_cache_of_the_candidate(
    baseline: EvalReport, candidate: tuple[EvalReport, list[ProgressEvent]]
) -> None:
    plain, fp8 = baseline.engine, candidate[0].engine
    assert (plain.linear_kernels, plain.kv_cache_dtype, plain.quantization) == ((), "auto", None)
    assert fp8.linear_kernels == ("PerTensorTorchFP8ScaledMMLinearKernel",)
    assert (fp8.kv_cache_dtype, fp8.quantization) == ("fp8", "compressed-tensors")
    assert (plain.device_class, plain.plugin, plain.dtype, plain.max_model_len) == (
        "cpu",
        "fp8pipe_cpu",
        "bfloat16",
        256,
    )
    assert not any(str(value).startswith("/") for value in fp8.arguments.values())


@pytest.mark.vllm
def test_baseline_and_candidate_scored_the_same_samples(
    baseline: EvalReport, candidate: tuple[EvalReport, list[ProgressEvent]]
) -> None:
    report, events = candidate
    for ours, theirs in zip(baseline.tasks, report.tasks, strict=True):
        assert (ours.doc_ids, ours.doc_hashes, ours.prompt_hashes) == (
            theirs.doc_ids,
            theirs.doc_hashes,
            theirs.prompt_hashes,
        )
        assert ours.target_hashes == theirs.target_hashes
        assert (ours.num_fewshot, ours.version) == (2, "3.0")
    generate = report.task("tiny_generate")
    assert generate is not None
    assert len(generate.doc_ids) == 10
    # A random model never says the newline that ends an answer: every generation is cut, and most hold no digit.
    assert generate.truncated == (True,) * 10
    digit, raw = generate.samples_of("exact_match", "digit"), generate.samples_of("exact_match", "raw")
    assert digit is not None and any(digit.extraction_failed)
    assert raw is not None and raw.extraction_failed == ()
    assert baseline.tokenizer_hash == report.tokenizer_hash
    assert baseline.add_bos_token
    assert [event.done for event in events if event.total == 10][-1] == 10
    assert [event.done for event in events if event.total == 72][-1] == 72


@pytest.mark.vllm
def test_broken_checkpoint_fails_with_vllms_own_words(tiny_llama: Path, task_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(EngineFailed, match=r"(?s)incomplete metadata, file not fully covered.*worker.log"):
        run(broken, tmp_path / "evaluation", make_suite(task_dir))
    assert "Traceback" in (tmp_path / "evaluation" / "worker.log").read_text()
