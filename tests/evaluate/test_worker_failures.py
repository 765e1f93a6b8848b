"""A worker that fails: what the error says, when it is started again with less, and that nothing half-made stays.

The worker is a few lines of code in the place of vLLM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.evaluation import ask, evaluate_by, interpreter
from support.processes import all_gone

from fp8pipe.errors import ConfigError, EngineFailed, SourceChanged
from fp8pipe.evaluate.memory import shortage, smaller
from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.progress import ProgressEvent
from fp8pipe.records import Retry


def test_failing_engine_names_cause_log_tail_and_log(model: Path, tmp_path: Path) -> None:
    worker = """
        print("loading shard 1")
        raise RuntimeError("CUDA error: no kernel image")
    """
    with pytest.raises(EngineFailed) as caught:
        evaluate_by(interpreter(tmp_path, worker), ask(model), tmp_path / "evaluation")
    message = str(caught.value)
    assert "exit 1): RuntimeError: CUDA error: no kernel image" in message
    assert "  | loading shard 1" in message
    assert str(tmp_path / "evaluation" / "worker.log") in message


def test_hung_engine_is_ended(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8pipe.evaluate.STALL_S", 1.5)
    python = interpreter(tmp_path, "path.with_name('pid').write_text(str(os.getpid())); time.sleep(600)")
    with pytest.raises(EngineFailed, match="no sign of life"):
        evaluate_by(python, ask(model), tmp_path / "evaluation")
    assert all_gone([int((tmp_path / "evaluation" / "pid").read_text())])


def test_error_of_the_worker_keeps_its_class(model: Path, tmp_path: Path) -> None:
    worker = """
        message = {"error": "ConfigError", "message": "lm-eval knows no task 't'"}
        os.write(int(os.environ["SUPERVISE_CHANNEL"]), json.dumps(message).encode() + b"\\n")
        sys.exit(2)
    """
    with pytest.raises(ConfigError, match=r"knows no task 't'.*worker\.log"):
        evaluate_by(interpreter(tmp_path, worker), ask(model), tmp_path / "evaluation")


def test_candidate_altered_while_it_is_measured_voids_the_measurement(model: Path, tmp_path: Path) -> None:
    worker = "report(); Path(json.loads(path.read_text())['model'], 'config.json').write_text('{\"changed\": 1}')"
    with pytest.raises(SourceChanged):
        evaluate_by(interpreter(tmp_path, worker), ask(model, role="candidate"), tmp_path / "evaluation")
    assert not (tmp_path / "evaluation" / "report.json").exists()


# ---------------------------------------------------------------------------------------------- out of memory


def test_killed_engine_is_explained_as_lack_of_memory(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match=r"ran out of memory.*retried 2 times"):
        evaluate_by(interpreter(tmp_path, "os.kill(os.getpid(), 9)"), ask(model), tmp_path / "evaluation")


def test_killed_engine_is_started_again_with_less_and_the_report_says_so(model: Path, tmp_path: Path) -> None:
    worker = """
if len((path.parent / "started").read_text()) < 3:
    os.kill(os.getpid(), 9)
report()
"""
    events: list[ProgressEvent] = []
    report = evaluate_by(interpreter(tmp_path, worker), ask(model), tmp_path / "evaluation", events.append)
    assert ["killed (signal 9)" in retry.cause for retry in report.retries] == [True, True]
    first, second = (retry.changed for retry in report.retries)
    assert (first["max_num_seqs"], second["max_num_seqs"]) == (64, 16)
    assert "max_model_len" not in first
    assert second["max_model_len"] == 2048
    assert any("max_model_len=2048" in event.note for event in events)
    again = evaluate_by(interpreter(tmp_path, "sys.exit(1)"), ask(model), tmp_path / "evaluation")
    assert again == report  # finished: not started again


def test_a_candidate_starts_with_the_reductions_that_its_baseline_needed(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    assert evaluate_by(interpreter(tmp_path), ask(model), folder).retries == ()
    needed = (Retry(cause="out of memory", changed={"max_model_len": 512}),)
    assert evaluate_by(interpreter(tmp_path), ask(model, retries=needed), folder).retries == needed
    assert EvalRequest.load(folder / "request.json").reduced == {"max_model_len": 512}
    again = evaluate_by(interpreter(tmp_path, "sys.exit(1)"), ask(model, retries=needed), folder)
    assert again.retries == needed


MESSAGES = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB",
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
    "ValueError: To serve at least one request with the models's max seq len (32768), (4.00 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (1.00 GiB).",
    "ValueError: Free memory on device (10.0/79.0 GiB) on startup is less than desired GPU memory utilization (0.9)",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_shortage_of_memory_is_recognized_by_the_engines_words(message: str) -> None:
    assert shortage(f"INFO loading\n{message}\nINFO leaving", 1) == message


def test_a_kill_is_a_shortage_and_other_failures_are_not() -> None:
    assert "killed" in (shortage("loading", 137) or "")
    assert shortage("RuntimeError: size mismatch for lm_head.weight", 1) is None


def test_retries_ask_for_smaller_batches_first_and_then_for_half_the_context(tmp_path: Path) -> None:
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


def test_retries_halve_the_context_at_once_when_the_cache_does_not_hold_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = smaller({"max_model_len": 32768}, MESSAGES[2], 1, tmp_path)
    assert first["max_model_len"] == 16384
    assert smaller(first, MESSAGES[2], 2, tmp_path)["max_model_len"] == 8192


def test_once_its_data_is_loaded_the_worker_has_no_token(tmp_path: Path) -> None:
    """The model may bring code of its own, which runs when the engine starts."""
    (tmp_path / "token").write_text("hf_stored")
    code = (
        "from huggingface_hub import get_token; from fp8pipe.hub.client import forget_token\n"
        "before = get_token(); forget_token(); print(before, get_token())"
    )
    for given in ("hf_given", ""):
        own = os.environ | {"HF_TOKEN": given, "HF_TOKEN_PATH": str(tmp_path / "token")}
        done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
        assert done.stdout.split() == [given or "hf_stored", "None"], done.stderr
