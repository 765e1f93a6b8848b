"""Data parallelism: several copies of the engine that share the prompts, in real vLLM."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from support.evaluation import ask, evaluate_by
from support.nvidia_smi import H100, Machine, uuid_of
from support.processes import all_gone, processes

from fp8pipe.config import EvalSuite, Parallel
from fp8pipe.errors import EngineFailed
from fp8pipe.evaluate import copies
from fp8pipe.progress import ProgressEvent
from fp8pipe.records import EvalReport


def test_each_copy_sees_gpus_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine((H100,) * 8).install(tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(uuid_of(i) for i in (6, 4, 2, 0)))
    seen = [environ["CUDA_VISIBLE_DEVICES"] for environ in copies._environments(2, 2)]
    assert seen == [f"{uuid_of(6)},{uuid_of(4)}", f"{uuid_of(2)},{uuid_of(0)}"]


def test_copies_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    environs = copies._environments(2, 1)
    assert [environ["VLLM_CPU_OMP_THREADS_BIND"] for environ in environs] == ["0,2", "1,3"]
    assert {environ["OMP_NUM_THREADS"] for environ in environs} == {"2"}
    assert copies._environments(5, 1)[4]["OMP_NUM_THREADS"] == "4", "more copies than cores share all"


def writing_to(log: Path) -> list[int]:
    """The processes that have this file open."""
    found = []
    for pid in processes():
        with contextlib.suppress(OSError):
            if any(fd.resolve() == log for fd in Path(f"/proc/{pid}/fd").iterdir()):
                found.append(pid)
    return found


@pytest.fixture(scope="session")
def doubled(full_suite: EvalSuite) -> EvalSuite:
    return full_suite.model_copy(update={"parallel": Parallel(data=2)})


@pytest.mark.vllm
def test_two_copies_measure_what_one_does(
    baseline: EvalReport, warm_python: str, tiny_llama: Path, doubled: EvalSuite, tmp_path: Path
) -> None:
    events: list[ProgressEvent] = []
    report = evaluate_by(warm_python, ask(tiny_llama, doubled), tmp_path, events.append)
    assert report.suite_digest == baseline.suite_digest
    assert report.engine.arguments == baseline.engine.arguments | {"data_parallel_size": 2}
    assert report.engine.model_bytes == 2 * (baseline.engine.model_bytes or 0) > 0
    for ours, theirs in zip(report.tasks, baseline.tasks, strict=True):
        asked = ("task", "doc_ids", "doc_hashes", "prompt_hashes", "target_hashes")
        assert [getattr(ours, name) for name in asked] == [getattr(theirs, name) for name in asked]
        for one, other in zip(ours.metrics, theirs.metrics, strict=True):
            # in other batches: an answer may flip where two are nearly as likely
            assert sum(a != b for a, b in zip(one.values, other.values, strict=True)) <= 2
    assert report.proof is not None and baseline.proof is not None
    for rank in (0, 1):
        modules = [one for one in report.proof.modules if one.rank == rank]
        assert [one.model_copy(update={"rank": 0}) for one in modules] == list(baseline.proof.modules)
    assert {(flip.task, flip.n) for flip in report.flips} == {("tiny_generate", 10)}
    assert report.serving is not None and report.serving.output_throughput > 0
    assert [event.done for event in events if event.total == 10][-1] == 10
    assert all_gone(writing_to(tmp_path / "worker.log"))


@pytest.mark.vllm
def test_a_copy_that_does_not_start_is_told_with_vllms_own_words(
    warm_python: str, tiny_llama: Path, doubled: EvalSuite, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    words = r"(?s)copy [12] of 2 of the engine: .*incomplete metadata, file not fully covered.*worker.log"
    with pytest.raises(EngineFailed, match=words):
        evaluate_by(warm_python, ask(broken, doubled), tmp_path / "evaluation")
    assert all_gone(writing_to(tmp_path / "evaluation" / "worker.log"))
