"""What happens to an evaluation that is interrupted, runs out of memory, or is repeated: parts, retries, findings."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.evaluation import make_suite, make_tasks, make_tiny_llama, processes_of
from support.processes import all_gone

from fp8pipe.config import ServingWorkload, TaskSpec
from fp8pipe.errors import EngineFailed, InputError
from fp8pipe.evaluate import evaluate
from fp8pipe.evaluate.flips import flip_rates
from fp8pipe.evaluate.memory import shortage, smaller
from fp8pipe.evaluate.parts import Part, Parts, joined, table_rows
from fp8pipe.evaluate.sample_texts import finding
from fp8pipe.evaluate.serving import check_fits
from fp8pipe.progress import ProgressEvent
from fp8pipe.records import EvalReport, MetricSamples, TaskResult

# ---------------------------------------------------------------------------------------------- parts


def result(values: list[float], first: int = 0, metric: str = "acc", weights: tuple[float, ...] = ()) -> TaskResult:
    ids = tuple(range(first, first + len(values)))
    samples = MetricSamples(
        metric=metric,
        filter="none",
        higher_is_better=True,
        mean=math.fsum(values) / len(values),
        stderr=None,
        values=tuple(values),
        weights=weights,
    )
    hashes = tuple(f"h{i}" for i in ids)
    return TaskResult(
        task="t",
        version="1",
        num_fewshot=0,
        doc_ids=ids,
        doc_hashes=hashes,
        prompt_hashes=hashes,
        target_hashes=hashes,
        metrics=(samples,),
    )


def part(values: list[float], start: int, identity: str = "me", **options: Any) -> Part:
    task = result(values, start, **options)
    return Part(identity=identity, start=start, stop=start + len(values), result=task, rows={"results": {"t": {}}})


def test_parts_are_found_as_a_chain_from_the_first_document(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "me")
    for one in (part([1.0, 0.0], 0), part([1.0], 2), part([0.0], 4)):
        parts.save("a/t", one)
    assert [(p.start, p.stop) for p in parts.find("a/t", [10])] == [(0, 2), (2, 3)]
    assert [(p.start, p.stop) for p in parts.find("a/t", [2])] == [(0, 2)]
    assert parts.find("a/t", [1]) == []


def test_parts_whose_prompts_depend_on_one_go_are_found_where_one_looked(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "me")
    for one in (part([1.0, 0.0], 0), part([1.0], 2), part([0.0] * 3, 0)):
        parts.save("t", one)
    places = [[(p.start, p.stop) for p in parts.find("t", stops, whole_looks=True)] for stops in ([3], [2, 3], [1, 3])]
    assert places == [[(0, 3)], [(0, 2), (2, 3)], []]


def test_parts_of_another_measurement_or_task_are_not_used(tmp_path: Path) -> None:
    Parts(tmp_path, "other").save("t", part([1.0], 0, identity="other"))
    Parts(tmp_path, "me").save("t-2", part([1.0], 0))
    (tmp_path / "t-0-9.json").write_text("{half")
    assert Parts(tmp_path, "me").find("t", [10]) == []


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=5), min_size=1, max_size=4))
def test_joined_parts_equal_one_measurement_of_all(pieces: list[list[float]]) -> None:
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    together = joined([part(values, start) for values, start in zip(pieces, starts, strict=True)])
    whole = [value for values in pieces for value in values]
    expected = result(whole)
    assert together.doc_hashes == expected.doc_hashes
    assert together.metrics[0].values == tuple(whole)
    assert together.metrics[0].mean == pytest.approx(sum(whole) / len(whole))


def test_joined_perplexity_weighs_documents_by_their_words() -> None:
    # 10 words at -1 nat each, 30 words at -2 nats each: exp(70 / 40)
    pieces = [
        part([-1.0], 0, metric="word_perplexity", weights=(10.0,)),
        part([-2.0], 1, metric="word_perplexity", weights=(30.0,)),
    ]
    assert joined(pieces).metrics[0].mean == pytest.approx(math.exp(70 / 40))
    plain = [part([-1.0], 0, metric="perplexity"), part([-2.0, -3.0], 1, metric="perplexity")]
    assert joined(plain).metrics[0].mean == pytest.approx(math.exp(2))


def test_joined_standard_error_is_lm_evals() -> None:
    from lm_eval.api.metrics import mean_stderr

    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    together = joined([part(values[:2], 0), part(values[2:], 2)])
    assert together.metrics[0].stderr == pytest.approx(mean_stderr(values))
    row = table_rows("t", [part(values[:2], 0), part(values[2:], 2)])["results"]["t"]
    assert (row["acc,none"], row["acc_stderr,none"]) == (together.metrics[0].mean, together.metrics[0].stderr)


def test_flip_rate_counts_samples_that_changed_and_refuses_other_samples() -> None:
    [rate] = flip_rates(result([1.0, 0.0, 1.0, 1.0]), result([1.0, 1.0, 0.0, 1.0]))
    assert (rate.n, rate.flipped, rate.rate) == (4, 2, 0.5)
    with pytest.raises(EngineFailed, match="other samples"):
        flip_rates(result([1.0]), result([1.0], first=1))


# ---------------------------------------------------------------------------------------------- sample generation


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("Paris, which lies on the Seine.", list(range(40)), None),
        ("", [], "empty"),
        (" \n\t", [5, 6, 7], "empty"),
        ("the the the", [9] * 64, "repeating"),
        ("...", [1, 2, 3] + [9] * 15, None),
        ("...", [1, 2, 3] + [9] * 16, "repeating"),
        ("a b c d", [4, 5, 6, 7, 8] * 4, "repeating"),
        ("a b c d", [*([4, 5, 6, 7, 8] * 4), 3], None),
        ("a b c d", [4, 5, 6, 7, 8] * 3, None),
        ("long", [*range(100, 116)] * 4, "repeating"),
    ],
)
def test_empty_and_endlessly_repeating_text_is_a_finding(text: str, tokens: list[int], expected: str | None) -> None:
    assert finding(text, tokens) == expected


def test_workload_longer_than_the_context_is_refused() -> None:
    check_fits(ServingWorkload(input_len=100, output_len=28), 128)
    with pytest.raises(InputError, match="129 tokens, the engine's context is 128"):
        check_fits(ServingWorkload(input_len=100, output_len=29), 128)


# ---------------------------------------------------------------------------------------------- memory

MESSAGES = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB",
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
    "ValueError: To serve at least one request with the models's max seq len (32768), (4.00 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (1.00 GiB).",
    "ValueError: Free memory on device (10.0/79.0 GiB) on startup is less than desired GPU memory utilization (0.9)",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_shortage_is_told_by_the_engines_words(message: str) -> None:
    assert shortage(f"INFO loading\n{message}\nINFO leaving", 1) == message


def test_other_failures_are_no_shortage_and_a_kill_is() -> None:
    assert shortage("RuntimeError: size mismatch for lm_head.weight", 1) is None
    assert "killed" in (shortage("loading", 137) or "")


def test_retries_ask_for_smaller_batches_first_and_for_half_the_context_then(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 8192}))
    first = smaller({"gpu_memory_utilization": 0.9}, MESSAGES[0], 1, tmp_path)
    assert first == {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.8}
    second = smaller(first, MESSAGES[0], 2, tmp_path)
    assert second == {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 1024,
        "gpu_memory_utilization": 0.6,
        "max_model_len": 4096,
    }


def test_a_cache_that_holds_no_whole_context_asks_for_half_of_it_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = smaller({"max_model_len": 32768}, MESSAGES[2], 1, tmp_path)
    assert first["max_model_len"] == 16384
    assert smaller(first, MESSAGES[2], 2, tmp_path)["max_model_len"] == 8192


def test_an_engine_that_fails_while_it_is_timed_ends_every_request() -> None:
    from fp8pipe.evaluate.serving import _Requests

    class Engine:
        def add_request(self, *_: object) -> None: ...

        def has_unfinished_requests(self) -> bool:
            return True

        def step(self) -> list[Any]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    async def ask() -> list[object]:
        requests, one = _Requests(Engine()), SimpleNamespace(output_len=4, ignore_eos=True, prompt_len=2, prompt=[1, 2])
        asked = [requests(cast(Any, one), cast(Any, None)) for _ in range(3)]
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)

    assert [type(answer) for answer in asyncio.run(ask())] == [torch.OutOfMemoryError] * 3


# ---------------------------------------------------------------------------------------------- real vLLM


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def comparable(report: EvalReport) -> dict[str, Any]:
    """A report without what differs from run to run: times."""
    return report.model_dump(mode="json", exclude={"seconds", "serving"})


MEASURE = """
import sys
from pathlib import Path
from fp8pipe.config import EvalSuite
from fp8pipe.evaluate import evaluate
model, suite, folder = sys.argv[1:]
suite = EvalSuite.model_validate_json(suite)
evaluate(Path(model), suite, Path(folder), role="baseline", model_id="m", fingerprint="f")
"""


@pytest.mark.vllm
def test_killed_evaluation_goes_on_where_it_was_and_gives_the_same_report(llama: Path, tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path / "tasks")
    spec = {"tiny_generate": TaskSpec(num_fewshot=2, samples=10, repeat=True), "tiny_choose": TaskSpec(num_fewshot=2)}
    suite = make_suite(tasks, **spec).model_copy(
        update={"serving": ServingWorkload(num_prompts=4, input_len=32, output_len=8, max_concurrency=2)}
    )

    def measure(folder: Path, notes: list[str]) -> EvalReport:
        progress: Callable[[ProgressEvent], None] = lambda event: notes.append(event.note)  # noqa: E731
        return evaluate(llama, suite, folder, role="baseline", model_id="m", fingerprint="f", progress=progress)

    notes: list[str] = []
    undisturbed = measure(tmp_path / "undisturbed", notes)
    killed = tmp_path / "killed"
    kill_after(killed / "parts" / "tiny_generate-0-10.json", [str(llama), suite.model_dump_json(), str(killed)])
    assert not (killed / "report.json").exists()
    again: list[str] = []
    assert comparable(measure(killed, again)) == comparable(undisturbed)
    assert "tiny_generate (1 of 2)" in notes
    assert "tiny_generate (1 of 2)" not in again
    assert "tiny_choose (2 of 2)" in again
    check_serving_and_flips(undisturbed)


def kill_after(sign: Path, arguments: list[str]) -> None:
    """Run MEASURE in a process of its own and kill that as soon as `sign` exists; its engine ends with it."""
    folder = Path(arguments[-1])
    with subprocess.Popen([sys.executable, "-c", MEASURE, *arguments]) as parent:
        deadline = time.monotonic() + 300
        while not sign.exists():
            assert parent.poll() is None and time.monotonic() < deadline, (folder / "worker.log").read_text()[-3000:]
            time.sleep(0.01)
        started = processes_of(folder)
        parent.kill()
    assert len(started) >= 2, "the guard and the worker"
    assert all_gone(list(started))


BEATING = """\
#!/bin/sh
case "$*" in *fp8pipe.evaluate.worker*)
  {python} -IS -c 'while True: print(flush=True); __import__("time").sleep(1)' &
esac
exec {python} "$@"
"""
"""An interpreter whose worker has a companion: an empty line in the log every second, however long vLLM is silent while
it starts. So a short limit fits, and nothing but a stop of them all is a stall."""


@pytest.mark.vllm
def test_stopped_vllm_is_ended_as_hung_with_everything_beside_it(llama: Path, tmp_path: Path) -> None:
    suite = make_suite(make_tasks(tmp_path / "tasks"), tiny_generate=TaskSpec(num_fewshot=2))
    folder, python = tmp_path / "evaluation", tmp_path / "python"
    python.write_text(BEATING.format(python=sys.executable))
    python.chmod(0o755)
    started: dict[int, str] = {}

    def stop(event: ProgressEvent) -> None:
        if event.note.startswith("tiny_generate") and not started:
            started.update(processes_of(folder))
            for pid, command in started.items():
                if "supervise.py" not in command:
                    os.kill(pid, signal.SIGSTOP)

    asked: dict[str, Any] = {"role": "baseline", "model_id": "m", "fingerprint": "f", "python": str(python)}
    with pytest.raises(EngineFailed) as caught:
        evaluate(llama, suite, folder, stall_s=20.0, progress=stop, **asked)
    message = str(caught.value)
    assert len(started) >= 3, f"the guard, the worker and its companion: {started}; {message}"
    assert all_gone(list(started))
    assert "no sign of life any more" in message
    assert re.search(r"^  \| .*INFO.* init engine ", message, re.MULTILINE), f"the end of the log: {message}"
    assert f"full log: {folder}/worker.log" in message
    assert not (folder / "report.json").exists()


def check_serving_and_flips(report: EvalReport) -> None:
    assert {(flip.task, flip.n) for flip in report.flips} == {("tiny_generate", 10)}
    served = report.serving
    assert served is not None and not served.comparable
    assert served.workload["input_len"] == 32
    # 32 + 8 tokens a request: the throughputs are of one duration
    assert served.total_token_throughput == pytest.approx(40 * served.request_throughput)
    assert served.output_throughput == pytest.approx(8 * served.request_throughput)
    assert 0 < served.median_ttft_ms <= served.p99_ttft_ms
    # 258 x 128 embeddings and output, per layer q, k, v, o and three of the MLP, norms; two bytes each
    weights = 2 * 258 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256 + 2 * 128) + 128
    assert report.engine.model_bytes is not None
    assert report.engine.model_bytes >= 2 * weights
    assert len(report.samples) == 6


@pytest.mark.vllm
def test_context_that_does_not_fit_is_halved_and_the_report_says_so(llama: Path, tmp_path: Path) -> None:
    # The cache is 1 GiB; a token takes 4 KiB (2 layers, K and V, 4 heads of 128, two bytes): 262,144 tokens.
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = tmp_path / "wide"
    make_tiny_llama(wide)
    config = LlamaConfig.from_pretrained(wide)
    for name, value in {"head_dim": 128, "num_key_value_heads": 4, "max_position_embeddings": 400_000}.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).bfloat16().save_pretrained(wide)
    suite = make_suite(make_tasks(tmp_path / "tasks"), tiny_choose=TaskSpec(samples=2))
    suite = suite.model_copy(update={"engine": {"max_model_len": 400_000}})
    report = evaluate(wide, suite, tmp_path / "evaluation", role="baseline", model_id="m", fingerprint="f")
    [retry] = report.retries
    assert "KV cache" in retry.cause
    assert report.engine.arguments["max_num_seqs"] == retry.changed["max_num_seqs"] == 64
    assert retry.changed["max_model_len"] == report.engine.max_model_len == 200_000
    assert report.engine.arguments["max_model_len"] == 200_000


@pytest.mark.vllm
@pytest.mark.parametrize(("kv_cache_dtype", "online"), [("fp8_e5m2", None), ("fp8_e4m3", "fp8")])
def test_online_and_cache_variants_are_candidates_that_say_what_they_are(
    llama: Path, tmp_path: Path, kv_cache_dtype: str, online: str | None
) -> None:
    from fp8pipe.stages import evaluate_model

    suite = make_suite(make_tasks(tmp_path / "tasks"), tiny_choose=TaskSpec(samples=4))
    report = evaluate_model(
        str(llama), suite, tmp_path / "evaluation", kv_cache_dtype=kv_cache_dtype, online=online, limit=None
    )
    assert report.role == "candidate"
    assert report.engine.kv_cache_dtype == kv_cache_dtype
    assert (report.engine.quantization is not None) == (online is not None)
    assert (report.engine.linear_kernels != ()) == (online is not None)
