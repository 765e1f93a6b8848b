"""What an edit of config.json means: another model, or nothing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fp8pipe.oracle.configs import Comparison, compare, compare_each

Config = dict[str, Any]

SOURCE: Config = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "vocab_size": 96,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}

OTHER_MODEL: dict[str, Config] = {
    "rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "rms_norm_eps": {"rms_norm_eps": 1e-5},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "sliding_window": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    "layer_types": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32},
    "num_experts_per_tok": {"num_experts_per_tok": 1},
    "norm_topk_prob": {"norm_topk_prob": None},
    "num_hidden_layers": {"num_hidden_layers": 3},
    "hidden_act": {"hidden_act": "gelu"},
    "dtype": {"dtype": "float16"},
    "model_type": {"model_type": "mixtral"},
    "architectures": {"architectures": ["MixtralForCausalLM"]},
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}},
    "unreadable": {"num_attention_heads": "many"},
}
"""By what is edited; None drops a key."""
SAME_MODEL: dict[str, Config] = {
    "transformers_version": {"transformers_version": "4.1.0"},
    "defaults": {"initializer_range": 0.02, "attention_bias": False, "use_sliding_window": False},
    "number": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    "old_names": {"dtype": None, "torch_dtype": "bfloat16", "rope_parameters": None, "rope_theta": 10000.0},
    "no_dtype": {"dtype": None},
    "quantization": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
}
NOBODY_ASKS = {"colour": {"colour": "blue"}}
ONLY_VLLM_ASKS = {"dual_chunk": {"dual_chunk_attention_config": {"chunk_size": 8}}}


def _edited(config: Config, edit: Config) -> Config:
    merged = dict(reversed((config | edit).items()))
    return {key: value for key, value in merged.items() if value is not None}


@pytest.fixture(scope="module")
def answers() -> dict[str, Comparison]:
    edits = OTHER_MODEL | SAME_MODEL | NOBODY_ASKS | ONLY_VLLM_ASKS
    found = compare_each([_edited(SOURCE, edit) for edit in edits.values()], SOURCE, dtype="bfloat16")
    return dict(zip(edits, found, strict=True))


@pytest.mark.parametrize("edit", OTHER_MODEL)
def test_edit_that_makes_another_model_is_seen(answers: dict[str, Comparison], edit: str) -> None:
    assert any(difference.readers for difference in answers[edit].differences)


@pytest.mark.parametrize("edit", SAME_MODEL)
def test_other_spelling_of_the_same_model_is_no_difference(answers: dict[str, Comparison], edit: str) -> None:
    assert not answers[edit].differences


def test_key_that_no_library_asks_for_is_told_from_one_that_vllm_alone_does(answers: dict[str, Comparison]) -> None:
    (colour,), (chunks,) = answers["colour"].differences, answers["dual_chunk"].differences
    assert colour.readers == ()
    assert chunks.readers == (("vLLM",) if find_spec("vllm") else ())


def test_model_that_no_library_has_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path))
    theirs = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "its.Own"}}
    answer = compare(theirs | {"layers": 3}, theirs, dtype=None)
    assert answer == Comparison(readers=(), differences=())
