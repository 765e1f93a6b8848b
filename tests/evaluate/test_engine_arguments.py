"""Engine arguments that do not fit are told in one line before any engine starts; trust reaches the engine."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.evaluation import ask

from fp8pipe.config import EvalSuite, Parallel, TaskSpec
from fp8pipe.errors import ConfigError
from fp8pipe.evaluate.arguments import known_arguments, longest_context
from fp8pipe.machine.engine_python import own


def suite(**engine: Any) -> EvalSuite:
    return EvalSuite(name="own", tasks={"t": TaskSpec()}, engine=engine)


def test_a_misspelt_argument_is_told_with_the_right_name(model: Path) -> None:
    words = "suite own: engine: max_modle_len is no argument of the installed vLLM; did you mean max_model_len"
    with pytest.raises(ConfigError, match=words) as caught:
        ask(model, suite(max_modle_len=256))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_arguments_of_vllm_and_of_lm_evals_model_are_known(model: Path) -> None:
    engine = {
        "max_model_len": 256,
        "enforce_eager": True,
        "max_gen_toks": 64,
        "dtype": "auto",
    }
    assert ask(model, suite(**engine)).engine.items() >= engine.items()


def test_how_the_engine_is_spread_is_no_engine_argument_of_a_suite_but_becomes_one(model: Path) -> None:
    words = "tensor_parallel_size: write `parallel: {tensor: 4}` beside `engine` instead"
    with pytest.raises(ValidationError, match=words):
        suite(tensor_parallel_size=4)
    parallel = Parallel(tensor=4, data=2, expert=True)
    asked = ask(model, suite().model_copy(update={"parallel": parallel}))
    known = {"tensor_parallel_size": 4, "data_parallel_size": 2, "enable_expert_parallel": True}
    processes = {"distributed_executor_backend": "mp"}  # of the CPU platform, one for each rank
    one = ask(model, suite()).engine
    assert one["distributed_executor_backend"] == "uni"
    assert asked.engine == one | known | processes
    assert asked.parallel == parallel and asked.parallel.devices == 8


@pytest.mark.vllm
def test_the_known_names_are_the_fields_of_vllms_own_class() -> None:
    from vllm.engine.arg_utils import EngineArgs

    assert {field.name for field in dataclasses.fields(EngineArgs)} <= known_arguments(own())


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 8192}, "vision_config": {"seq_length": 64}}, 8192),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_parameters": {"full_attention": {"factor": 2}}}, 8192),
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),
        ({"model_type": "rwkv"}, None),
    ],
)
def test_the_longest_context_is_what_config_json_allows(config: dict[str, Any], longest: int | None) -> None:
    assert longest_context(config) == longest


def test_a_context_longer_than_the_models_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    with pytest.raises(ConfigError, match="max_model_len: 8192 is more than the 4096 tokens"):
        ask(model, suite(max_model_len=8192))
    ask(model, suite(max_model_len=4096))
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    ask(model, suite(max_model_len=8192))


def test_trust_reaches_the_engine_and_changes_no_other_request(model: Path) -> None:
    plain, trusted = ask(model), ask(model, trust_remote_code=True)
    assert "trust_remote_code" not in plain.engine
    assert trusted.engine == plain.engine | {"trust_remote_code": True}


CHILD = """
import os, sys
from fp8pipe.evaluate.environment import prepare_process
import fp8pipe.evaluate.worker_side
prepare_process()
assert not {"lm_eval", "vllm", "prefect", "transformers"} & sys.modules.keys()
assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
"""


def test_a_workers_functions_need_no_lm_eval_and_workers_are_not_forked() -> None:
    subprocess.run([sys.executable, "-c", CHILD], check=True)
