"""Reports of tiny models that real vLLM served: facts, samples, variants, retries and errors."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support.evaluation import ask, evaluate_by, make_fp8_kv_twin, make_suite, make_tiny_llama
from support.machine import require_fp8_kv_cache

from fp8pipe import stages
from fp8pipe.config import EvalSuite, TaskSpec
from fp8pipe.errors import EngineFailed
from fp8pipe.gate.modules import compare_modules
from fp8pipe.progress import ProgressEvent
from fp8pipe.records import EvalReport

pytestmark = pytest.mark.vllm


def test_report_equals_what_lm_evals_command_line_says(
    baseline: EvalReport, warm_python: str, tiny_llama: Path, task_dir: Path, tmp_path: Path
) -> None:
    samples = {task.task: sorted(task.doc_ids) for task in baseline.tasks}
    arguments = f"pretrained={tiny_llama},max_model_len=256,add_bos_token=True,seed=7"
    command = [warm_python, "-m", "fp8pipe.evaluate.lm_eval", "run", "--model", "vllm", "--model_args", arguments]
    command += ["--tasks", *samples, "--include_path", str(task_dir), "--num_fewshot", "2", "--seed", "7"]
    command += ["--samples", json.dumps(samples), "--log_samples", "--output_path", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
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


def test_facts_name_the_fp8_kernels_and_cache_of_the_candidate(
    baseline: EvalReport, candidate: tuple[EvalReport, list[ProgressEvent]]
) -> None:
    plain, fp8 = baseline.engine, candidate[0].engine
    assert (plain.linear_kernels, plain.kv_cache_dtype, plain.quantization) == ((), "auto", None)
    assert fp8.linear_kernels == ("ReferenceFp8W8A8LinearKernel",)
    assert (fp8.kv_cache_dtype, fp8.quantization) == ("fp8", "compressed-tensors")
    assert (plain.device_class, plain.plugin) == ("cpu", "fp8pipe_cpu")
    assert (plain.dtype, plain.max_model_len) == ("bfloat16", 256)
    assert not any(str(value).startswith("/") for value in fp8.arguments.values())


def test_every_layer_is_proved_before_the_first_prompt_and_once(
    baseline: EvalReport, candidate: tuple[EvalReport, list[ProgressEvent]]
) -> None:
    """The twin's q, k and v have a scale each, so its fused projections are not what was stored; the others are."""
    ours, theirs = baseline.proof, candidate[0].proof
    assert ours is not None and theirs is not None
    assert [one.name for one in ours.modules] == [one.name for one in theirs.modules]
    assert [one.name for one in ours.modules if one.name.startswith("model.layers.1.")] == [
        f"model.layers.1.{leaf}"
        for leaf in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    for one in compare_modules(ours, theirs):
        assert one.error < one.bound, one.place
        if one.candidate.scheme:
            fused = one.candidate.name.endswith(("qkv_proj", "gate_up_proj"))
            assert one.stored_error is not None, one.place
            assert one.stored_error > 0.005 if fused else one.stored_error < 0.003, one.place
    assert "every module through its kernel" in {event.note for event in candidate[1]}


def test_weights_are_counted_as_they_were_loaded(baseline: EvalReport) -> None:
    # 258 x 128 embeddings and output; per layer q, k, v, o, three of the MLP, and norms; two bytes each
    weights = 2 * 258 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256 + 2 * 128) + 128
    assert baseline.engine.model_bytes is not None
    assert baseline.engine.model_bytes >= 2 * weights


def test_baseline_and_candidate_scored_the_same_samples(
    baseline: EvalReport, candidate: tuple[EvalReport, list[ProgressEvent]]
) -> None:
    report, events = candidate
    for ours, theirs in zip(baseline.tasks, report.tasks, strict=True):
        assert (ours.doc_ids, ours.doc_hashes) == (theirs.doc_ids, theirs.doc_hashes)
        assert (ours.prompt_hashes, ours.target_hashes) == (theirs.prompt_hashes, theirs.target_hashes)
        assert (ours.num_fewshot, ours.version) == (2, "3.0")
    generate = report.task("tiny_generate")
    assert generate is not None
    assert len(generate.doc_ids) == 10
    # A random model never generates the newline that ends an answer: every generation is cut, most hold no digit.
    assert generate.truncated == (True,) * 10
    digit, raw = generate.samples_of("exact_match", "digit"), generate.samples_of("exact_match", "raw")
    assert digit is not None and any(digit.extraction_failed)
    assert raw is not None and raw.extraction_failed == ()
    assert baseline.tokenizer_hash == report.tokenizer_hash
    assert baseline.add_bos_token
    assert [event.done for event in events if event.total == 10][-1] == 10
    assert [event.done for event in events if event.total == 72][-1] == 72


def test_baseline_reports_its_own_noise_and_its_timings(
    baseline: EvalReport, candidate: tuple[EvalReport, list[ProgressEvent]]
) -> None:
    assert {(flip.task, flip.n, flip.suite) for flip in baseline.flips} == {("tiny_generate", 10, None)}
    assert candidate[0].flips == ()
    assert len(baseline.samples) == 6
    served = baseline.serving
    assert served is not None and not served.comparable
    assert served.workload["input_len"] == 32
    # 32 + 8 tokens a request: the throughputs are of one duration
    assert served.total_token_throughput == pytest.approx(40 * served.request_throughput)
    assert served.output_throughput == pytest.approx(8 * served.request_throughput)
    assert 0 < served.median_ttft_ms <= served.p99_ttft_ms


def test_online_quantization_and_its_cache_are_named_in_the_report(
    warm_python: str, tiny_llama: Path, task_dir: Path, tmp_path: Path
) -> None:
    require_fp8_kv_cache()
    suite = make_suite(task_dir, tiny_choose=TaskSpec(samples=4))
    request = ask(tiny_llama, suite, role="candidate", kv_cache_dtype="fp8_e4m3", online="fp8")
    engine = evaluate_by(warm_python, request, tmp_path).engine
    assert engine.kv_cache_dtype == "fp8_e4m3"
    assert engine.quantization == "fp8"
    assert engine.linear_kernels != ()


@pytest.mark.parametrize(
    ("method", "asked", "cache"),
    [("compressed-tensors", "auto", "fp8"), ("compressed-tensors", "bfloat16", "bfloat16"), ("fp8", "auto", "auto")],
)
def test_a_kv_cache_scheme_alone_turns_the_fp8_cache_on_where_vllm_reads_it(
    warm_python: str, tiny_llama: Path, task_dir: Path, tmp_path: Path, method: str, asked: str, cache: str
) -> None:
    """What --kv-cache-dtype does, and its absence: the cards' and README's words about the serve line rest on this."""
    require_fp8_kv_cache()
    twin = make_fp8_kv_twin(tiny_llama, tmp_path / "fp8")
    if method == "fp8":
        config = json.loads((twin / "config.json").read_text())
        ours = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
        config["quantization_config"] = ours | {"kv_cache_scheme": "static"}
        (twin / "config.json").write_text(json.dumps(config))
    suite = make_suite(task_dir, tiny_choose=TaskSpec(samples=2))
    request = ask(twin, suite, role="candidate", kv_cache_dtype=asked)
    assert evaluate_by(warm_python, request, tmp_path / "evaluation").engine.kv_cache_dtype == cache


def test_context_that_does_not_fit_is_halved_and_the_report_says_so(
    warm_python: str, monkeypatch: pytest.MonkeyPatch, task_dir: Path, tmp_path: Path
) -> None:
    """Measured by its path, with a cache in E5M2 of 1 GiB, in which 262,144 tokens find room.

    A token takes 4 KiB: two layers, K and V, 8 heads of 128, one byte.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    require_fp8_kv_cache()
    wide = make_tiny_llama(tmp_path / "wide")
    config = LlamaConfig.from_pretrained(wide)
    sizes = {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 400_000}
    for name, value in sizes.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).bfloat16().save_pretrained(wide)
    suite = make_suite(task_dir, tiny_choose=TaskSpec(samples=2))
    suite = suite.model_copy(update={"engine": {"max_model_len": 400_000}})
    monkeypatch.setattr("sys.executable", warm_python)
    report = stages.evaluate_model(
        str(wide), suite, tmp_path / "evaluation", kv_cache_dtype="fp8_e5m2", online=None, limit=None
    )
    assert (report.role, report.engine.kv_cache_dtype, report.engine.quantization) == ("candidate", "fp8_e5m2", None)
    [retry] = report.retries
    assert "KV cache" in retry.cause
    assert report.engine.arguments["max_num_seqs"] == retry.changed["max_num_seqs"] == 64
    assert retry.changed["max_model_len"] == report.engine.max_model_len == 200_000
    assert report.engine.arguments["max_model_len"] == 200_000


def test_broken_checkpoint_fails_with_vllms_own_words(
    warm_python: str, tiny_llama: Path, full_suite: EvalSuite, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(EngineFailed, match=r"(?s)incomplete metadata, file not fully covered.*worker.log"):
        evaluate_by(warm_python, ask(broken, full_suite), tmp_path / "evaluation")
    assert "Traceback" in (tmp_path / "evaluation" / "worker.log").read_text()
