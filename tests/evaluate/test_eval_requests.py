"""Which requests are equal: when a finished report is found, and when a model is measured again."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.evaluation import ask, evaluate_by, interpreter, looker, make_suite, make_tasks
from support.nvidia_smi import MACHINES
from support.tiny_models import make_model

from fp8pipe.config import EvalSuite, Parallel, TaskSpec, load_recipe
from fp8pipe.errors import EngineFailed, ModelNotFound
from fp8pipe.evaluate import baseline_key
from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Retry, record_path


def test_identities_are_those_of_earlier_versions() -> None:
    """Written out: with another identity, finished reports and parts on disk would not be found. That of a report has
    the version of the module proof, so that one without it is joined again from its parts."""
    request = EvalRequest(
        role="candidate",
        model_id="m",
        model="/somewhere",
        fingerprint="f",
        folder_identity="i",
        suite=EvalSuite(name="tiny", tasks={"t": TaskSpec(num_fewshot=2, samples=10)}),
        suite_digest="d",
        limit=5,
        looks=(0.5, 1.0),
        engine={
            "enforce_eager": True,
            "gpu_memory_utilization": 0.3,
            "distributed_executor_backend": "uni",
            "seed": 7,
            "max_model_len": 256,
            "kv_cache_dtype": "fp8",
            "quantization": "fp8",
        },
        versions={"vllm": "1", "lm_eval": "2", "transformers": "3", "torch": "4"},
        device_class="cpu",
        retries=(Retry(cause="c", changed={"max_model_len": 128}),),
    )
    assert request.identity() == "2f434c432c0dd879cbce81b0cdb7fe279647c2c54774bbfe4daddc5a49c43f20"
    assert request.parts_identity() == "0a1ddefe70f42aca65215a4ba7ad3e53b3368f10c6cb59feddcb4df93e5baa69"


def test_finished_report_is_returned_without_starting_anything(model: Path, tmp_path: Path) -> None:
    python, folder = interpreter(tmp_path), tmp_path / "evaluation"
    first = evaluate_by(python, ask(model), folder)
    assert evaluate_by(python, ask(model), folder) == first
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
        {"suite": EvalSuite(name="tiny", tasks={"t": TaskSpec()}, parallel=Parallel(data=2))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_report_of_another_request_is_not_reused(model: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    python, folder = interpreter(tmp_path), tmp_path / "evaluation"
    evaluate_by(python, ask(model), folder)
    evaluate_by(python, ask(model, **change), folder)
    assert (folder / "started").read_text() == "xx"


def test_report_of_an_earlier_look_is_found_after_the_next_one(model: Path, tmp_path: Path) -> None:
    python, folder = looker(tmp_path), tmp_path / "evaluation"
    first = evaluate_by(python, ask(model, looks=(0.5,)), folder)
    evaluate_by(python, ask(model, looks=(0.5, 1.0)), folder)
    assert evaluate_by(python, ask(model, looks=(0.5,)), folder) == first
    assert (folder / "started").read_text() == "xx"


def test_unfinished_run_leaves_no_report_of_an_earlier_one(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    evaluate_by(interpreter(tmp_path), ask(model), folder)
    with pytest.raises(EngineFailed):
        evaluate_by(interpreter(tmp_path, "sys.exit(1)"), ask(model, fingerprint="g"), folder)
    assert not (folder / "report.json").exists()


def test_description_and_place_of_a_suite_are_no_reason_to_measure_again(tmp_path: Path) -> None:
    one, other = make_tasks(tmp_path / "one"), tmp_path / "other"
    shutil.copytree(one, other)
    suite = make_suite(one)
    moved = suite.model_copy(update={"task_dir": str(other), "description": "the same"})
    assert baseline_key("sha", suite) == baseline_key("sha", moved)
    (other / "tiny_choose.yaml").write_text("task: changed\n")
    assert baseline_key("sha", suite) != baseline_key("sha", moved)
    assert baseline_key("sha", suite) != baseline_key("another", suite)
    assert baseline_key("sha", suite) != baseline_key("sha", suite, looks=(0.5, 1.0))


def test_the_engines_noise_on_a_task_is_the_same_in_every_suite_that_asks_it_so(model: Path) -> None:
    spec = TaskSpec(num_fewshot=2, samples=10, repeat=True)
    suite = EvalSuite(name="one", tasks={"t": spec, "u": TaskSpec()})
    other = EvalSuite(name="two", tasks={"t": TaskSpec(num_fewshot=2, repeat=True)}, sample_prompts=())
    rate = ask(model, suite).rate_identity("t")
    assert ask(model, other, limit=3, looks=(0.5, 1.0)).rate_identity("t") == rate
    shots = EvalSuite(name="one", tasks={"t": TaskSpec(num_fewshot=3)})
    templated = other.model_copy(update={"apply_chat_template": True})
    for changed in (shots, templated, other.model_copy(update={"parallel": Parallel(tensor=2)})):
        assert ask(model, changed).rate_identity("t") != rate
    assert ask(model, suite).rate_identity("u") != rate
    assert ask(model, suite, fingerprint="g").rate_identity("t") != rate


def test_a_baseline_on_several_devices_is_another_and_its_suite_the_same() -> None:
    one = EvalSuite(name="tiny", tasks={"t": TaskSpec()})
    two = one.model_copy(update={"parallel": Parallel(tensor=2)})
    assert one.digest() == two.digest()
    assert baseline_key("sha", one) == baseline_key("sha", one, parallel=Parallel())
    assert baseline_key("sha", one) != baseline_key("sha", one, parallel=Parallel(tensor=2))


def test_both_sides_are_spread_alike_by_the_unquantized_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MACHINES["8 x H100"].become(tmp_path / "bin", monkeypatch)
    assert ask(model).parallel == Parallel()
    assert ask(model, source_bytes=141 * 10**9).parallel == Parallel(tensor=2)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        ask(tmp_path / "nothing")


def test_without_vllm_a_request_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(EngineFailed, match="install the cpu or gpu extra"):
        ask(model)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "online", "role"),
    [("auto", None, "baseline"), ("fp8_e5m2", None, "candidate"), ("auto", "fp8", "candidate")],
)
def test_a_model_with_changed_weights_or_cache_is_a_candidate(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_cache_dtype: str, online: str | None, role: str
) -> None:
    from fp8pipe import stages

    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    suite, folder = EvalSuite(name="tiny", tasks={"t": TaskSpec()}), tmp_path / "evaluation"
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path))
    stages.evaluate_model(str(model), suite, folder, kv_cache_dtype=kv_cache_dtype, online=online, limit=3)
    request = EvalRequest.load(folder / "request.json")
    assert (request.role, request.limit) == (role, 3)
    assert (request.engine["kv_cache_dtype"], request.engine.get("quantization")) == (kv_cache_dtype, online)


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "fp8-static-kv"])
def test_a_checkpoint_measured_by_hand_is_served_as_its_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    from fp8pipe import stages

    chosen, checkpoint, folder = load_recipe(recipe), tmp_path / "checkpoint", tmp_path / "evaluation"
    stages.quantize_model(str(make_model(tmp_path / "model")), load_recipe("fp8-dynamic"), checkpoint)
    path = record_path(checkpoint, "plan")
    Plan.load(path).model_copy(update={"settings": chosen}).save(path)
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path))
    suite = EvalSuite(name="tiny", tasks={"t": TaskSpec()})
    stages.evaluate_model(str(checkpoint), suite, folder, kv_cache_dtype="auto", online=None, limit=None)
    request = EvalRequest.load(folder / "request.json")
    assert request.engine["kv_cache_dtype"] == ("fp8" if chosen.kv_cache is not None else "auto")


def test_asking_for_evaluate_imports_neither_torch_nor_vllm() -> None:
    code = """
import sys
from fp8pipe.config import EvalSuite, TaskSpec
from fp8pipe.evaluate import baseline_key
baseline_key("sha", EvalSuite(name="s", tasks={"t": TaskSpec()}))
exit(", ".join({"torch", "vllm", "lm_eval", "transformers"} & sys.modules.keys()) or 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
