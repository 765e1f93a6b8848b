"""One model over several ranks on the CPU, each a process of real vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.evaluation import ask, evaluate_by

from benchmarks.zoo.rows import examine
from fp8pipe.config import EvalSuite, Parallel, load_recipe
from fp8pipe.errors import ConfigError
from fp8pipe.evaluate import environment
from fp8pipe.gate.modules import compare_modules
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import make_plan
from fp8pipe.records import EvalReport


def test_ranks_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 6})
    assert environment.processor_shares(2) == ["0,2,6", "1,3"]
    assert environment.processor_shares(6) == ["0,1,2,3,6"] * 6


def test_a_pipeline_on_the_cpu_is_refused(tiny_llama: Path, full_suite: EvalSuite) -> None:
    with pytest.raises(ConfigError, match=r"parallel.pipeline is 2; expected 1 without a GPU.*use `tensor` or `data`"):
        ask(tiny_llama, full_suite.model_copy(update={"parallel": Parallel(pipeline=2)}))


@pytest.mark.long
@pytest.mark.vllm
def test_two_ranks_measure_what_one_does_and_each_proves_its_modules(
    baseline: EvalReport, warm_python: str, tiny_llama: Path, full_suite: EvalSuite, tmp_path: Path
) -> None:
    suite = full_suite.model_copy(update={"parallel": Parallel(tensor=2)})
    report = evaluate_by(warm_python, ask(tiny_llama, suite), tmp_path / "baseline")
    for ours, theirs in zip(report.tasks, baseline.tasks, strict=True):
        assert ours.prompt_hashes == theirs.prompt_hashes
        for one, other in zip(ours.metrics, theirs.metrics, strict=True):
            # sums in another order: an answer may flip where two are nearly as likely
            assert sum(a != b for a, b in zip(one.values, other.values, strict=True)) <= 2
    assert (report.engine.model_bytes or 0) >= (baseline.engine.model_bytes or 0) > 0, "of both ranks"
    assert report.proof is not None and baseline.proof is not None
    names = {one.name for one in baseline.proof.modules}
    for rank in (0, 1):
        assert {one.name for one in report.proof.modules if one.rank == rank} == names

    fp8 = quantized(tiny_llama, tmp_path / "fp8")
    candidate = evaluate_by(warm_python, ask(fp8, suite, role="candidate"), tmp_path / "candidate")
    assert candidate.proof is not None
    compared = compare_modules(report.proof, candidate.proof)
    assert len(compared) == len(report.proof.modules)
    assert {one.candidate.rank for one in compared if one.candidate.scheme} == {0, 1}
    assert all(0 < one.error <= one.bound for one in compared if one.candidate.scheme)


def quantized(source: Path, folder: Path) -> Path:
    """The model in `source`, with fp8-dynamic."""
    snapshot = resolve(str(source))
    plan = make_plan(snapshot, read_headers(snapshot), load_recipe("fp8-dynamic"), examine(snapshot))
    quantize(snapshot, plan, folder)
    return folder
